"""What the benchmarks share: what ran, results as CSV, ratios against the bars."""

import csv
import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe(*packages: str) -> dict[str, str]:
    """Machine, versions of torch and ``packages``, commit (+: with uncommitted changes) and date of this run.

    A copy without its history is told the commit by the environment's ``BENCHMARK_COMMIT``.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "machine": machine(),
        **{package: installed(package) for package in ("torch", *packages)},
        "commit": (commit or os.environ.get("BENCHMARK_COMMIT", "unknown")) + ("+" if dirty else ""),
        "date": datetime.date.today().isoformat(),
    }


def installed(package: str) -> str:
    """Its version, "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text()
    models = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    name = models[0] if models else platform.machine()
    bfloat16 = "-BF16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{bfloat16}, {torch.get_num_threads()} threads"


def write_csv(path: Path, rows: list[dict], *packages: str) -> None:
    """One line a row, with the columns of :func:`describe`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = describe(*packages)
    rows = [row | about for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: short(value) for key, value in row.items()} for row in rows)
    print(f"\n{path}")


def print_table(header: list[str], rows: list[list]) -> None:
    """A Markdown table."""
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(str(short(value)) for value in row) + " |")


def verdict(value: float, bar: float, at_least: bool) -> str:
    """The value, the bar, and whether it holds."""
    holds = value >= bar if at_least else value <= bar
    return f"{value:.3f} ({'≥' if at_least else '≤'} {bar}: {'yes' if holds else 'NO'})"


def short(value: object) -> object:
    """Four significant digits of a float."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
