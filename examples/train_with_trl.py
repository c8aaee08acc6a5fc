"""Fine-tune a quantized base with TRL, on prompts and completions; a plain ``LoraConfig`` is all it takes.

    python examples/train_with_trl.py ./my-gptq-base ./outputs --data pairs.jsonl

Each line of ``pairs.jsonl`` is ``{"prompt": …, "completion": …}``. Needs ``pip install ".[peft]" trl``.
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from qalora_plugin import QALoraMergeCallback, load_base

EXAMPLES = [{"prompt": f"What is {n} plus {n}? ", "completion": f"It is {n + n}."} for n in range(64)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a quantized base with TRL.")
    parser.add_argument("base", help="quantized base: folder or Hub id")
    parser.add_argument("out", help="folder for the run; the merged checkpoint is OUT/merged")
    parser.add_argument("--data", help="a .jsonl file of prompts and completions; default: a few sums")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="as for a LoRA")
    args = parser.parse_args()

    rows = load_dataset("json", data_files=args.data, split="train") if args.data else Dataset.from_list(EXAMPLES)
    trainer = SFTTrainer(
        load_base(args.base, dtype="auto"),
        SFTConfig(
            args.out,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            logging_steps=10,
            report_to=[],
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"),
        callbacks=[QALoraMergeCallback(args.base)],
    )
    trainer.train()
    print(f"serve it: vllm serve {args.out}/merged")


if __name__ == "__main__":
    main()
