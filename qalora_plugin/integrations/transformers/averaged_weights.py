"""The weights that a run with a schedule-free optimizer ends with."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class AveragedWeights(TrainerCallback):
    """Ends training with the weights that a schedule-free optimizer evaluates. It trains others, and transformers goes
    back to those after each evaluation. (The best checkpoint's, which it has loaded by then, are such already.)"""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            return
        if callable(average := getattr(kwargs.get("optimizer"), "eval", None)):
            average()
