"""Rows of a part of the GPU check: in a CSV as soon as they are known, so that a run cut off keeps what it had."""

import argparse
import csv
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from report import describe, short

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Record:
    """A CSV with the columns ``names`` and those of :func:`report.describe`; :meth:`add` appends a row to the disk."""

    def __init__(self, path: Path, names: list[str]):
        self.path, self.about = path, describe("transformers", "triton", "peft")
        self.names = [*names, *self.about]
        with path.open("w", newline="") as file:
            csv.DictWriter(file, self.names, lineterminator="\n").writeheader()

    def add(self, **row: object) -> None:
        print(*(f"{name} {short(value)}" for name, value in row.items()), sep=" · ", flush=True)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.names, lineterminator="\n").writerow(
                {name: short(value) for name, value in (row | self.about).items()}
            )


def part_arguments(description: str) -> argparse.Namespace:
    """What every part is started with."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV")
    parser.add_argument("--bundle", type=Path, help="unpacked folder of gpu_bundle.py")
    parser.add_argument("--tiny", action="store_true", help="small shapes, few repeats: a rehearsal")
    return parser.parse_args()


def reading(name: str, measure: Callable[[], dict]) -> dict:
    """``measure()``; where memory runs out or a kernel fails, a row that says so, and the check goes on."""
    try:
        return measure()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())[:150]
        print(f"{name}: {message}", flush=True)
        return {"note": f"{type(error).__name__}: {message}"}
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
