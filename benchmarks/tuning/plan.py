"""The jobs of the accuracy table, in order of worth: a run that is cut off keeps what it had."""

import json
from collections.abc import Iterable
from pathlib import Path

from tuning.jobs import RATES, SEEDS, STEPS, Job

BASES = ((4, 32, False), (2, 32, True), (3, 32, True), (4, 64, False))  # bits, group size, clipped
TUNED_ON = {"task": "gsm8k", "seed": SEEDS[0]}
TUNED_BASE = {"bits": 4, "group_size": 32}
ON_16_BIT = ("lora", "qlora", "galore")
LIKE = {  # whose learning rate a method takes
    "lora": "lora", "qlora": "lora", "galore": "galore", "peft": "offsets", "offsets": "offsets", "scales": "scales",
    "scales-all-tokens": "scales", "scales-calibrated": "scales", "peqa": "peqa", "scale-units": "scale-units",
}  # fmt: skip


def tuning() -> list[Job]:
    """Every rate of every method whose rate is its own, on one seed."""
    return [
        Job(method=method, lr=lr, **TUNED_ON, **({} if method in ON_16_BIT else TUNED_BASE))
        for method, rates in RATES.items()
        for lr in rates
    ]


def best_rates(results: Iterable[dict]) -> dict[str, float]:
    """Method → the rate with the lowest held-out loss on the seed and the base that rates are tuned on."""
    names = {job.name for job in tuning()}
    found: dict[str, tuple[float, float]] = {}
    for row in results:
        if "loss" in row and job_of(row).name in names:
            found[row["method"]] = min(found.get(row["method"], (float("inf"), 0.0)), (row["loss"], row["lr"]))
    return {method: found[like][1] for method, like in LIKE.items() if like in found}


def table(rates: dict[str, float]) -> list[Job]:
    """All runs of the table, for the methods whose rates are known."""
    wanted: list[tuple[str, str, tuple[int, int, bool] | None]] = []
    four, two, three, four_64 = BASES
    for method in ("lora", "qlora"):
        wanted.append(("gsm8k", method, None))
    for base in (four, two, three):
        wanted += [("gsm8k", method, base) for method in ("offsets", "scales")]
    wanted += [("gsm8k", "scales-calibrated", base) for base in (two, three, four)]
    wanted += [("gsm8k", "scales-all-tokens", base) for base in (four, two)]
    wanted += [("gsm8k", method, four_64) for method in ("scales", "offsets")]
    wanted += [("functions", "lora", None)]
    wanted += [("functions", method, base) for base in (four, two, three) for method in ("scales", "offsets")]
    wanted += [("gsm8k", "peft", base) for base in (four, two)]
    wanted += [("gsm8k", "peqa", base) for base in (four, two)]
    wanted += [("gsm8k", "scale-units", base) for base in (four, two)]
    wanted += [("functions", "qlora", None), ("functions", "scales-calibrated", two), ("gsm8k", "galore", None)]
    wanted += [("gsm8k", "scales-all-tokens", three), ("gsm8k", "peqa", three), ("gsm8k", "scale-units", three)]
    return [
        Job(task, method, rates[method], seed, *(base or ()))
        for task, method, base in wanted
        if method in rates
        for seed in SEEDS
    ]


def job_of(row: dict) -> Job:
    return Job(**{name: row[name] for name in Job.__dataclass_fields__})


def read(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
