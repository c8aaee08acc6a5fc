"""Trains under FSDP2 with the HF Trainer, ends with the best checkpoint, and resumes others; run as two processes.

Arguments: base, another of the same shapes, output folder. Each rank leaves what it found in ``rank{n}.json``.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from support.axolotl_process import use_gloo
from transformers import Trainer, TrainerCallback, TrainingArguments

from qalora_plugin import QALoraMergeCallback, add_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.sharded_checkpoints import full_adapter

base, other_base, out = map(Path, sys.argv[1:])
ROWS = [{"input_ids": list(range(4 + i, 24 + i)), "labels": list(range(4 + i, 24 + i))} for i in range(32)]


class Seen(TrainerCallback):
    """The whole adapter at the beginning of a run, and after each step."""

    def __init__(self):
        self.adapters = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.adapters.setdefault(state.global_step, full_adapter(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.adapters[state.global_step] = full_adapter(model)


class FirstIsBest(Trainer):
    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": float(self.state.global_step)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def trainer(kind: str, folder: Path, of: Path = base, **lora) -> tuple[Trainer, Seen]:
    AcceleratorState._reset_state()
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        per_device_train_batch_size=1, learning_rate=0.01, lr_scheduler_type="constant", report_to=[], use_cpu=True,
        fsdp=True, fsdp_config={
            "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind,
            "cpu_ram_efficient_loading": False,
        },
    )  # fmt: skip
    model = add_adapter(load_base(of, dtype=torch.float32), **{"r": 4, "target_modules": "all-linear"} | lora)
    seen = Seen()
    callbacks = [QALoraMergeCallback(of), seen]
    return FirstIsBest(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:2], callbacks=callbacks), seen


def difference(one: dict, two: dict) -> float:
    return max((one[name] - two[name]).abs().max().item() for name in one)


def refusal(kind: str, checkpoint: Path, **options) -> str:
    resumed, _ = trainer(kind, out / "refused", **options)
    try:
        resumed.train(resume_from_checkpoint=str(checkpoint))
    except QALoraError as error:
        return str(error)
    return "none"


def main() -> None:
    torch.set_num_threads(1)
    use_gloo(sharded=True)
    found = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        first, seen = trainer(kind, out / kind)
        first.train()
        checkpoint = out / kind / "checkpoint-1"
        best = full_adapter(first.model)
        resumed, again = trainer(kind, out / f"{kind} again")
        resumed.train(resume_from_checkpoint=str(checkpoint))
        found[kind] = {
            "trained": difference(seen.adapters[1], seen.adapters[2]),
            "best": difference(best, seen.adapters[1]),
            "resumed": difference(again.adapters[1], seen.adapters[1]),
            "went on": difference(again.adapters[2], seen.adapters[2]),
            "alpha": refusal(kind, checkpoint, lora_alpha=64),
            "base": refusal(kind, checkpoint, of=other_base),
        }
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
