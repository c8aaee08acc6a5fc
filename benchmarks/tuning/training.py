"""Training as the HF Trainer does it, alike for every method, and what it costs."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from tuning import rows
from tuning.jobs import Job

GALORE: dict[str, Any] = {
    "optim": "galore_adamw",
    "optim_target_modules": [r".*\.(q|k|v|o|gate|up|down)_proj"],
    "optim_args": "rank=64, update_proj_gap=40, scale=0.5",
}
LOGGED = 12  # times


class Seconds(TrainerCallback):
    """Of every step."""

    def __init__(self) -> None:
        self.all: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.all.append(time.perf_counter() - self._started)


def train(model: nn.Module, job: Job, batches: list, out: Path, device: str) -> dict[str, object]:
    """One step a batch; returns the first and last losses, the median step's seconds and the peak of GPU memory."""
    arguments = TrainingArguments(
        output_dir=str(out / job.name),
        max_steps=len(batches),
        per_device_train_batch_size=1,  # of ready batches
        learning_rate=job.lr,
        lr_scheduler_type="cosine",
        warmup_steps=len(batches) // 10,
        weight_decay=0.0,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        bf16=True,
        logging_steps=max(1, len(batches) // LOGGED),
        save_strategy="no",
        report_to=[],
        seed=job.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=device == "cpu",
        **(GALORE if job.method == "galore" else {"optim": "adamw_torch"}),
    )
    seconds = Seconds()
    trainer = Trainer(
        model, arguments, train_dataset=batches, data_collator=lambda one: rows.collate(one[0]), callbacks=[seconds]
    )
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": len(batches),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "step_seconds": statistics.median(seconds.all),
        "train_seconds": time.perf_counter() - started,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else 0.0,
    }
