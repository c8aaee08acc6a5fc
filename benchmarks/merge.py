"""What does a merge cost, beside copying the checkpoint?

    python benchmarks/merge.py                    0.1, 1 and 7 GB; a size that the disk cannot hold is skipped
    python benchmarks/merge.py --sizes 1 --rounds 5

Times whole processes, each round in another order, and the same merges called where torch is loaded, as at the end of a
training run:

    cp -r       the checkpoint copied            cp -al             the same hard-linked
    merge       ``qalora merge``, shards linked  merge --copy       the same, shards copied
    merge()     the function, shards linked      merge(copy=True)   the same, shards copied

The base is read once beforehand, so that ``cp`` and merge alike find it in the page cache, and the disk is idle when a
run starts. A merge by links flushes what it computed to the disk before the folder gets its name, which ``cp`` does
not. Writes one CSV row a size and method into ``results/``.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from merge_worker import prepare
from models import SHAPES, write_base
from report import RESULTS, write_csv
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file

from qalora_plugin.checkpoint.adapter_config import ADAPTER_FORMAT, POOLING
from qalora_plugin.checkpoint.adapter_folder import CONFIG_NAME, PEFT_TYPE, WEIGHTS_NAME
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.formats.opened import QuantizedCheckpoint

METHODS = ("cp -r", "cp -al", "merge", "merge --copy", "merge()", "merge(copy=True)")
TIME_BARS = {"merge": 0.5, "merge --copy": 1.2, "merge()": 0.5, "merge(copy=True)": 1.2}  # of the seconds of cp -r
PEAK_BAR = 600  # MB
WORKER = (sys.executable, str(Path(__file__).parent / "merge_worker.py"))


def write_sized_base(folder: Path, shape: str, gigabytes: float, group_size: int) -> Path:
    """A base with as many layers of ``shape`` as come to ``gigabytes``, at least one, and a small vocabulary."""
    one = SHAPES[shape] | {"num_hidden_layers": 1, "vocab_size": 512}
    hidden, inner = one["hidden_size"], one["intermediate_size"]
    kept = one["num_key_value_heads"] / one["num_attention_heads"]
    weights = hidden * hidden * (2 + 2 * kept) + 3 * hidden * inner
    layers = max(1, round(gigabytes * 1e9 / (weights * (0.5 + 2.5 / group_size))))  # codes; scales and zeros a group
    name = f"{shape}-{layers}-layers"
    SHAPES[name] = one | {"num_hidden_layers": layers}
    return write_base(folder / f"{name}-g{group_size}", name, group_size)


def write_adapter(folder: Path, base: Path, rank: int) -> Path:
    """A random adapter on every linear of ``base``."""
    source, tensors = QuantizedCheckpoint.open(base), {}
    generator = torch.Generator().manual_seed(0)
    for name, module in source.specs.items():
        for part, shape in {"A": (rank, module.groups), "B": (module.out_features, rank)}.items():
            key = f"base_model.model.{name}.lora_{part}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * 0.02
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    ours = {"pooling": POOLING, "format_version": ADAPTER_FORMAT, "base_fingerprint": source.fingerprint()}
    config = {"peft_type": PEFT_TYPE, "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "qalora": ours}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder


def run(method: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """``seconds`` of one process, or one call, that makes ``out``, which is removed; of a merge also ``peak_mb``."""
    if method.startswith("merge("):
        command = [*WORKER, "function", base, adapter, out, "copy" if "copy" in method else "links"]
    else:
        merging = [*WORKER, "command", *method.split(), "--base", base, "--adapter", adapter, "--out", out]
        command = merging if method.startswith("merge") else [*method.split(), base, out]
        prepare(base, out)
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{method} stopped:\n{done.stderr[-3000:]}")
    shutil.rmtree(out)
    return {"seconds": seconds} | (json.loads(done.stdout.split("@@")[1]) if method.startswith("merge") else {})


def measure(base: Path, adapter: Path, work: Path, rounds: int) -> list[dict]:
    """Median seconds, spread, share of ``cp -r`` and highest peak memory of every method."""
    samples = {method: [] for method in METHODS}
    for method in METHODS:  # a first round that does not count: page cache, bytecode
        run(method, base, adapter, work / "out")
    for i in track(range(rounds), base.name, transient=True):
        for method in METHODS[:: -1 if i % 2 else 1]:
            samples[method].append(run(method, base, adapter, work / "out"))
    cp = statistics.median(sample["seconds"] for sample in samples["cp -r"])
    rows = []
    for method, found in samples.items():
        seconds = [sample["seconds"] for sample in found]
        median = statistics.median(seconds)
        row = {
            "method": method,
            "seconds": median,
            "spread": (max(seconds) - min(seconds)) / median,
            "of_cp": median / cp,
        }
        if "peak_mb" in found[0]:
            row["peak_mb"] = max(sample["peak_mb"] for sample in found)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> Table:
    """A ✗ marks a missed bar."""
    out = Table("GB", "method", "seconds", "÷ cp -r", "peak MB", title="merge")
    for row in rows:
        out.add_row(
            f"{row['gigabytes']:.3g}" if row["method"] == METHODS[0] else "",
            row["method"],
            f"{row['seconds']:.2f}",
            _against(row["of_cp"], TIME_BARS.get(row["method"], float("inf")), "{:.2f}"),
            _against(row["peak_mb"], PEAK_BAR, "{:.0f}") if "peak_mb" in row else "",
        )
    return out


def _against(value: float, bar: float, style: str) -> str:
    return style.format(value) + (" ✗" if value > bar else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.1,1,7", help="GB of the base")
    parser.add_argument("--shape", default="7b", help="whose layers the base has; see models.py")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where bases are made and removed; default: the temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    rows = []
    for size in map(float, args.sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            work = Path(folder)
            free = shutil.disk_usage(work).free / 1e9
            if free < 2.5 * size:  # the base, one copy of it, offsets
                print(f"{size:g} GB is skipped: it needs {2.5 * size:.0f} GB of disk, {free:.0f} GB are free.")
                continue
            base = write_sized_base(work, args.shape, size, args.group_size)
            adapter = write_adapter(work / "adapter", base, args.rank)
            gigabytes = Checkpoint.open(base).nbytes / 1e9
            settings = {"gigabytes": gigabytes, "group_size": args.group_size, "rank": args.rank}
            rows += [settings | row for row in measure(base, adapter, work, args.rounds)]
    if not rows:
        raise SystemExit("Every size was skipped.")
    Console().print(table(rows))
    write_csv(args.out / "merge_cpu.csv", [{"peak_mb": ""} | row for row in rows])


if __name__ == "__main__":
    main()
