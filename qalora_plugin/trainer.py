"""For the HF Trainer and TRL, without Axolotl: a callback that merges when training ends."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .atomic import require_absent
from .errors import QALoraError


class QALoraMergeCallback(TrainerCallback):
    """Save the adapter to ``args.output_dir`` and merge it into ``out`` at the end of training.

    Args:
        base: the GPTQ base, as given to ``load_base``.
        out: folder of the merged checkpoint; default ``<output_dir>/merged``. Must not exist.
        merge_kwargs: passed to :func:`qalora_plugin.merge` (``offset_dtype``, ``copy``, ``revision``).
    """

    def __init__(self, base: str | Path, out: str | Path | None = None, **merge_kwargs: Any):
        self.base, self.out, self.merge_kwargs = base, out, merge_kwargs

    def _target(self, args: TrainingArguments) -> Path:
        return Path(self.out or Path(args.output_dir) / "merged")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Refuse before training what could not be merged after it."""
        model = kwargs["model"]
        config = getattr(model, "peft_config", {}).get("default")
        if getattr(config, "qalora", None) is None:
            raise QALoraError(
                f"the trainer's model ({type(model).__name__}) has no QA-LoRA adapter. "
                "Pass the model that add_adapter(load_base(…)) returns."
            )
        require_absent(self._target(args))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.is_world_process_zero:
            from .merging import merge

            kwargs["model"].save_pretrained(args.output_dir)
            merge(self.base, args.output_dir, self._target(args), **self.merge_kwargs)
