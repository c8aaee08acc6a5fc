"""Is a training step as fast as the frozen dense model's, and how much less memory does it take?

    python benchmarks/train_step.py                 on a CPU: the 99 M-parameter model; with CUDA: the 7B-shaped one
    python benchmarks/train_step.py --scenarios short --methods ours,dense
    (once: pip install -e ".[bench]", and pip install --no-deps peft optimum where GPTQModel is)

One run compares, each method in a process of its own, on the same shapes and tokens:

    dense   the frozen dense model, no adapter: forward and the gradient of every input. The limit.
    lora    PEFT LoRA on it            qlora   the same on bitsandbytes NF4
    peft    PEFT ``use_qalora`` on GPTQModel (in the environment that has GPTQModel; 16 bit only)
    ours    ``adapter: qalora``        scales  the same, with ``scales: true``

On a CPU all methods of a scenario stay loaded and take turns step by step, so that a machine that slows down slows all
of them; on a GPU they run one after the other, as a 7B model does not fit five times. Writes one CSV row a method and
scenario, and a plot, into ``results/``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from models import write_base, write_dense
from plot import plot
from report import RESULTS, write_csv
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qalora_plugin.kernels.hardware import emulates

HERE = Path(__file__).parent
ROOT = HERE.parent
METHODS = ("dense", "lora", "qlora", "peft", "ours", "scales")

# batch, length: tokens of a step. Everything else as in the first unless a scenario says otherwise.
COMMON = {"batch": 2, "length": 512, "rank": 16, "group_size": 32, "checkpointing": False}
SCENARIOS = {
    "cpu": [
        {},
        {"checkpointing": True},
        {"batch": 1},
        {"rank": 64},
        {"group_size": 128, "rank": 8},
    ],
    "cuda": [
        {"batch": 1, "length": length, "rank": rank, "group_size": group_size, "checkpointing": checkpointing}
        for checkpointing in (False, True)
        for length in (512, 2048, 4096, 8192)
        for rank in (8, 64)
        for group_size in (32, 128)
        if checkpointing or length <= 4096
    ],
    "short": [{}],
}
# ratio → bar, ours over the other; "memory" is a ceiling, the rest are floors
BARS = {
    "cpu": {"dense": 0.95, "lora": 1.2, "qlora": 1.3, "peft": 1.4, "memory": 0.75},
    "cuda": {"dense": 0.90, "lora": 1.0, "qlora": 1.4, "peft": 1.5, "memory": 0.9},
}


class Worker:
    """A method in its own process: :meth:`step` runs one step there, :meth:`finish` returns its peak memory."""

    def __init__(self, python: str, spec: dict, program: Path = HERE / "train_step_worker.py"):
        self.spec = spec
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            [python, str(program), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.versions = self._read()["versions"]

    def step(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def finish(self) -> float:
        self.process.stdin.close()
        peak = self._read()["peak_mb"]
        self.process.wait()
        return peak

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@@"):
                return json.loads(line[2:])
        self.errors.seek(0)
        raise SystemExit(f"{self.spec['method']} stopped:\n{self.errors.read()[-3000:]}")


def measure(specs: list[dict], pythons: dict[str, str], steps: int, together: bool) -> list[dict]:
    """Median seconds, last loss and peak memory of every spec."""
    results = []
    for batch in [specs] if together else [[spec] for spec in specs]:
        workers = [Worker(pythons[spec["method"]], spec) for spec in batch]
        rounds = [[worker.step() for worker in workers] for _ in range(steps)]
        for worker, done in zip(workers, zip(*rounds, strict=True), strict=True):
            seconds = [step["seconds"] for step in done]
            tokens = worker.spec["batch"] * worker.spec["length"]
            results.append(
                {
                    "seconds": statistics.median(seconds),
                    "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
                    "tokens_per_second": tokens / statistics.median(seconds),
                    "peak_mb": worker.finish(),
                    "loss": done[-1]["loss"],
                    "versions": worker.versions,
                }
            )
    return results


def table(rows: list[dict], device: str) -> Table:
    """Tokens/s and memory of every method, and ours ÷ theirs; a ✗ marks a missed bar."""
    out = Table(
        "scenario", "method", "tokens/s", "peak MB", "ours ÷ it", "memory ÷ it", title=f"training step, {device}"
    )
    bars = BARS[device]
    for row in rows:
        mine = next(r for r in rows if r["scenario"] == row["scenario"] and r["method"] == "ours")
        speed = mine["tokens_per_second"] / row["tokens_per_second"]
        memory = mine["peak_mb"] / row["peak_mb"]
        missed = "" if speed >= bars.get(row["method"], 0) else " ✗"
        fat = " ✗" if row["method"] == "qlora" and memory > bars["memory"] else ""
        out.add_row(
            row["scenario"] if row["method"] == METHODS[0] else "",
            row["method"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_mb']:.0f}",
            f"{speed:.2f}{missed}",
            f"{memory:.2f}{fat}",
        )
    return out


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="99m" if device == "cpu" else "7b", help="see models.py")
    parser.add_argument("--scenarios", default=device, choices=SCENARIOS)
    parser.add_argument("--methods", default=",".join(METHODS))
    dtypes = ("float32", "bfloat16") if device == "cpu" and emulates(torch.bfloat16) else ("bfloat16", "float32")
    parser.add_argument("--dtype", default=dtypes[0], choices=dtypes, help="default: float32 if bfloat16 is emulated")
    parser.add_argument("--steps", type=int, default=9, help="timed steps; their median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--models", type=Path, default=ROOT / ".cache/benchmarks", help="where the models are made")
    parser.add_argument("--train-python", default=sys.executable)
    parser.add_argument("--gptqmodel-python", default=str(ROOT / ".venv-serve/bin/python"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    pythons = dict.fromkeys(METHODS, args.train_python) | {"peft": args.gptqmodel_python}
    asked = set(args.methods.split(",")) - ({"peft"} if args.dtype == "float32" else set())  # GPTQModel: 16 bit only
    methods = [method for method in METHODS if method in asked]
    rows = []
    for changes in track(SCENARIOS[args.scenarios], "scenarios"):
        scenario = COMMON | changes
        group_size = scenario["group_size"]
        common = scenario | {
            "dense": str(write_dense(args.models / f"{args.shape}-dense", args.shape)),
            "base": str(write_base(args.models / f"{args.shape}-g{group_size}", args.shape, group_size)),
            "dtype": args.dtype, "device": device, "threads": args.threads, "warmup": 3,
        }  # fmt: skip
        name = "{batch}×{length} R{rank} g{group_size}".format(**scenario)
        name += " checkpointing" if scenario["checkpointing"] else ""
        results = measure([{"method": m} | common for m in methods], pythons, args.steps, device == "cpu")
        rows += [
            {"scenario": name, "method": m, "shape": args.shape, "dtype": args.dtype} | scenario | result
            for m, result in zip(methods, results, strict=True)
        ]
    Console().print(table(rows, device))
    for row in rows:
        row["versions"] = " ".join(f"{name}={version}" for name, version in row["versions"].items())
    name = f"train_step_{device}" + ("" if args.dtype == "bfloat16" else f"_{args.dtype}")
    write_csv(path := args.out / f"{name}.csv", rows)
    plot(path)


if __name__ == "__main__":
    main()
