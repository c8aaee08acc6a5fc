"""Runs jobs of the accuracy table, one after the other, and appends what they found to a file of JSON lines.

Several such processes may share a list of jobs: each takes the next one that nobody has.
"""

import argparse
import gc
import json
import shutil
import time
from pathlib import Path

import torch
from report import describe
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed
from tuning import rows
from tuning.jobs import BATCH, LONGEST, STEPS, Job
from tuning.methods import METHODS, Places

KEEP = ("lora",)  # adapters that are quantized afterwards
GALORE = {
    "optim": "galore_adamw",
    "optim_target_modules": [r".*\.(q|k|v|o|gate|up|down)_proj"],
    "optim_args": "rank=64, update_proj_gap=40, scale=0.5",
}


class Measured(TrainerCallback):
    """The median seconds of a step, and the peak of memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *_, **__) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def train(model: nn.Module, job: Job, batches: list, out: Path, device: str) -> dict[str, float]:
    """Train as the HF Trainer does; returns what it cost and the last losses."""
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=len(batches),
        per_device_train_batch_size=1,  # of ready batches
        learning_rate=job.lr,
        lr_scheduler_type="cosine",
        warmup_steps=len(batches) // 10,
        weight_decay=0.0,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        bf16=True,
        logging_steps=max(1, len(batches) // 12),
        save_strategy="no",
        report_to=[],
        seed=job.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=device == "cpu",
        **(GALORE if job.method == "galore" else {"optim": "adamw_torch"}),
    )
    measured = Measured()
    trainer = Trainer(
        model, arguments, train_dataset=batches, data_collator=lambda found: rows.collate(found[0]), callbacks=[measured]
    )
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ordered = sorted(measured.seconds)
    peak = torch.cuda.max_memory_allocated() / 1e6 if device != "cpu" else 0.0
    return {
        "first_loss": logged[0],
        "last_loss": sum(logged[-2:]) / 2,
        "step_seconds": ordered[len(ordered) // 2],
        "peak_mb": peak,
    }


def do(job: Job, data: Path, work: Path, device: str, limit: int | None) -> dict[str, object]:
    """One job, from the base to the losses of what it made."""
    tokenizer = AutoTokenizer.from_pretrained(data / "model")
    train_rows, test_rows = (
        rows.read(data / job.task / f"{part}.jsonl", tokenizer, LONGEST) for part in ("train", "test")
    )
    steps = limit or STEPS[job.task]
    if limit:
        train_rows = [row for row in train_rows if len(row[0]) < LONGEST // 2][: 2 * limit]
    batches = rows.batches(train_rows, 2 if limit else BATCH, steps, job.seed)
    places = Places(data, work / "adapters" / job.name, work / "merged" / job.name, device)
    for folder in (places.adapter, places.merged):
        shutil.rmtree(folder, ignore_errors=True)
    places.merged.parent.mkdir(parents=True, exist_ok=True)
    set_seed(job.seed)
    build, finish = METHODS[job.method]
    started = time.perf_counter()
    model = build(job, places)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ready = time.perf_counter()
    found = train(model, job, batches, work / "trainer" / job.name, device)
    done = time.perf_counter()
    model = finish(model, job, places)
    test_rows = test_rows[: 4 if limit else 600]
    losses = {
        "loss": rows.loss(model, test_rows),
        "prose": rows.loss(model, rows.prose(data / "prose.txt", tokenizer)[: 2 if limit else None]),
    }
    ended = time.perf_counter()
    for folder in (places.merged, work / "trainer" / job.name, *([] if job.method in KEEP else [places.adapter])):
        shutil.rmtree(folder, ignore_errors=True)
    return {
        **losses, "trained": trained, "steps": steps, **found,
        "build_seconds": ready - started, "train_seconds": done - ready, "eval_seconds": ended - done,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("jobs", type=Path, help="JSON lines of jobs")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="adapters, results.jsonl, and who took what")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="take no new job after so many")
    parser.add_argument("--limit", type=int, help="steps, for a rehearsal; measured on a few rows then")
    args = parser.parse_args()
    taken, results = args.work / "taken", args.work / "results.jsonl"
    taken.mkdir(parents=True, exist_ok=True)
    about, started = describe("transformers", "peft"), time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    for line in args.jobs.read_text().splitlines():
        job = Job(**json.loads(line))
        if time.monotonic() - started > args.seconds:
            break
        try:
            (taken / job.name).touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            found = do(job, args.data, args.work, args.device, args.limit)
        except Exception as error:  # a row that says so; the other jobs go on
            found = {"note": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        with results.open("a") as file:
            file.write(json.dumps(job.row() | found | about) + "\n")
        print(f"{time.monotonic() - started:6.0f} s", job.name, json.dumps(found), flush=True)
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
