"""Which jobs there are, in order of worth: what is cut off keeps what it had.

Learning rates are tuned on one seed, one task and one base; what a method's table needs is known once that is done.
"""

import json
from collections.abc import Iterable
from math import inf
from pathlib import Path
from typing import NamedTuple

from tuning.jobs import HEALED, RANK, REQUANTIZE, SEEDS, TASKS, Job, quantized

from qalora_plugin.checkpoint.replacing import replace_text


class Base(NamedTuple):
    """How a base is quantized."""

    bits: int
    group_size: int
    clip: bool = False
    gptaq: bool = False


FOUR, THREE, TWO = Base(4, 32), Base(3, 32, clip=True), Base(2, 32, clip=True)  # rates are tuned on the first
BY_GPTAQ = FOUR_A, THREE_A, TWO_A = tuple(base._replace(gptaq=True) for base in (FOUR, THREE, TWO))
FOUR_64, FOUR_64_A, EIGHT = Base(4, 64), Base(4, 64, gptaq=True), Base(8, 32)
OTHERS = (Base(2, 32), Base(3, 32), Base(4, 32, clip=True), EIGHT, FOUR_64_A)
RATES = {
    "lora": (3e-3, 1e-3, 1e-2),
    "offsets": (1e-2, 3e-3, 2e-2),
    "scales": (1e-2, 3e-3, 2e-2),
    "peqa": (3e-3, 1e-3),
    "galore": (1e-3, 3e-4),
}
LIKE = {  # whose rate a method takes, if not its own
    "qlora": "lora", "peft": "offsets", "scales-all-tokens": "scales", "scales-calibrated": "scales",
    REQUANTIZE: "lora", HEALED: "scales",
}  # fmt: skip
ON_16_BIT = ("lora", "galore")
SMALL_RANK = 4  # whose offsets take about the bits of the base alone


def first() -> list[Job]:
    """Bases, what they lose before any training, and the rates."""
    rates = [
        Job("gsm8k", method, *(() if method in ON_16_BIT else FOUR), lr=lr, seed=SEEDS[0])
        for method, tried in RATES.items()
        for lr in tried
    ]
    needed = [quantized(*base) for base in (FOUR, TWO, THREE, *BY_GPTAQ, FOUR_64)]
    untuned = [Job(task, "16-bit") for task in TASKS]
    untuned += [Job(task, "base", *base) for task in TASKS for base in (FOUR, THREE, TWO, *BY_GPTAQ, FOUR_64, *OTHERS)]
    lora, rest = rates[:3], rates[3:]
    return [needed[0], *lora, *needed[1:], *rest, *(quantized(*base) for base in OTHERS), *untuned]


def table(results: Iterable[dict]) -> list[Job]:
    """All other runs, for the methods whose rates are known."""
    rates = best_rates(results)
    wanted: list[tuple[str, str, Base | None]] = [("gsm8k", "lora", None)]
    wanted += [("gsm8k", method, base) for base in BY_GPTAQ for method in ("scales", REQUANTIZE)]
    wanted += [("gsm8k", "scales-calibrated", base) for base in (TWO_A, THREE_A, FOUR_A)]
    wanted += [("gsm8k", method, base) for base in (FOUR, TWO, THREE) for method in ("offsets", "scales")]
    wanted += [("gsm8k", REQUANTIZE, base) for base in (FOUR, TWO, THREE)]
    wanted += [("gsm8k", "scales-all-tokens", base) for base in (FOUR, TWO)]
    wanted += [("gsm8k", HEALED, base) for base in (THREE_A, TWO_A)]
    wanted += [("functions", "lora", None)]
    wanted += [("functions", method, base) for base in BY_GPTAQ for method in ("scales", REQUANTIZE, "offsets")]
    wanted += [("gsm8k", method, base) for base in (FOUR_64_A, FOUR_64) for method in ("scales", "offsets", REQUANTIZE)]
    wanted += [("gsm8k", "qlora", None), ("gsm8k", REQUANTIZE, (2, 32, False)), ("gsm8k", REQUANTIZE, (3, 32, False))]
    wanted += [("gsm8k", "peft", base) for base in (FOUR, TWO)]
    wanted += [("gsm8k", "peqa", base) for base in (FOUR, TWO, THREE)]
    wanted += [("functions", "scales-calibrated", base) for base in (TWO_A, THREE_A, FOUR_A)]
    wanted += [("gsm8k", "galore", None), ("functions", "qlora", None)]
    wanted += [("gsm8k", method, EIGHT) for method in ("scales", "offsets")]
    wanted += [("gsm8k", "scales-all-tokens", THREE), ("gsm8k", "peft", THREE)]
    return [
        Job(task, method, *(base or ()), lr=rate, seed=seed, rank=rank)
        for task, method, base in wanted
        if (rate := rates.get(LIKE.get(method, method)))
        for rank in ((RANK, SMALL_RANK) if (method, base) == ("offsets", FOUR) else (RANK,))
        for seed in SEEDS
    ]


def best_rates(results: Iterable[dict]) -> dict[str, float]:
    """Method → the rate with the lowest held-out loss, once all have been tried."""
    found: dict[tuple[str, float], float] = {}
    for row in results:
        on = Base(row["bits"], row["group_size"], row["clip"], row.get("gptaq", False))
        if row["task"] == "gsm8k" and row["seed"] == SEEDS[0] and on in (FOUR, Base(0, 0)):
            found[row["method"], row["lr"]] = row.get("loss", inf)
    best = {
        method: min(tried, key=lambda lr: found[method, lr])
        for method, tried in RATES.items()
        if all((method, lr) in found for lr in tried)
    }
    return {method: lr for method, lr in best.items() if found[method, lr] < inf}


def jobs(results: list[dict]) -> list[Job]:
    """All jobs that are known by now, in their order, none twice."""
    return list(dict.fromkeys([*first(), *table(results)]))


def failed(row: dict) -> bool:
    """Whether a row only says why nothing was found, as where training diverged."""
    return "note" in row


def write(results: Path, rows: Iterable[dict]) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    replace_text(results, "".join(json.dumps(row) + "\n" for row in rows), 0o644)


def read(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
