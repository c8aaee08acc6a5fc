"""Did a change cost speed or memory? This checkout against another one of this repository, taking turns.

    git worktree add --detach ../before v0.1.0
    python benchmarks/before_after.py ../before

Both run on the same models, in processes of their own: a training step (after every step the other's turn), and
`merge()` as after a training run. Writes ``results/before_after_cpu.csv``; the medians' ratios are printed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from merge import write_adapter
from models import write_base, write_dense
from report import RESULTS, write_csv
from train_step import COMMON, ROOT, Worker

HERE = Path(__file__).parent


def at(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree)}


def train(trees: dict[str, Path], models: Path, steps: int, **changes: object) -> list[dict]:
    scenario = COMMON | changes
    spec = scenario | {
        "method": "ours", "dense": str(write_dense(models / "99m-dense", "99m")),
        "base": str(write_base(models / f"99m-g{scenario['group_size']}", "99m", scenario["group_size"])),
        "dtype": "bfloat16", "device": "cpu", "threads": torch.get_num_threads(), "warmup": 3,
    }  # fmt: skip
    workers = {}
    for name, tree in trees.items():
        os.environ["PYTHONPATH"] = str(tree)
        workers[name] = Worker(sys.executable, spec, tree / "benchmarks" / "train_step_worker.py")
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(steps):
        for name, worker in workers.items():
            seconds[name].append(worker.step()["seconds"])
    what = f"train {scenario['batch']}×{scenario['length']}{' checkpointing' if scenario['checkpointing'] else ''}"
    return [
        {"what": what, "tree": name, "seconds": statistics.median(seconds[name]), "peak_mb": worker.finish()}
        for name, worker in workers.items()
    ]


def merges(trees: dict[str, Path], models: Path, times: int) -> list[dict]:
    base = write_base(models / "99m-g32", "99m", 32)
    found: dict[str, list[dict]] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory(dir=models) as place:
        adapter = write_adapter(Path(place) / "adapter", base, 16)
        for i in range(times):
            for name, tree in trees.items():
                worker = tree / "benchmarks" / "merge_worker.py"
                done = subprocess.run(
                    [sys.executable, worker, "function", base, adapter, Path(place) / f"{name}{i}", "links"],
                    env=at(tree), check=True, capture_output=True, text=True,
                )  # fmt: skip
                line = next(line for line in done.stdout.splitlines() if line.startswith("@@"))
                found[name].append(json.loads(line[2:]))
    return [
        {"what": "merge", "tree": name} | {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        for name, runs in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="checkout to compare with")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--models", type=Path, default=ROOT / ".cache/benchmarks")
    args = parser.parse_args()
    trees = {"other": args.other.resolve(), "this": ROOT}
    rows = merges(trees, args.models, 7)
    for changes in ({}, {"checkpointing": True}):
        rows += train(trees, args.models, args.steps, **changes)
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        speed, memory = (after[key] / before[key] for key in ("seconds", "peak_mb"))
        print(f"{after['what']}: {after['seconds']:.3f} s, {speed:.3f} of the other's; memory {memory:.3f} of it")
    write_csv(RESULTS / "before_after_cpu.csv", rows)


if __name__ == "__main__":
    main()
