"""What a GPU must show, in one command of some eight minutes.

    python benchmarks/gpu_check.py                   everything; figures into benchmarks/results/gpu/
    python benchmarks/gpu_check.py --bundle DIR      with stock kernels and bitsandbytes (gpu_bundle.py makes DIR)
    python benchmarks/gpu_check.py --rehearse        without CUDA: every part on tiny shapes

Needs torch, Triton, transformers, peft, blake3, pytest, hypothesis, rich and typer, and this repository; no vLLM, no
network. The parts run in order of worth, each in a process of its own with a time limit, and write what they find at
once: a run that is cut off keeps what it had. At the end: every bar, what was found, and whether it holds.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu.bars import print_bars
from report import RESULTS, describe

HERE = Path(__file__).parent
ROOT = HERE.parent
KERNELS = ("test_gpu", "test_grouped", "test_scales_triton", "test_offsets_op", "test_offsets_triton")
TESTS = [f"tests/kernels/{name}.py" for name in KERNELS]
NOT_HERE = "not compile_for and not compiles_for"  # these tests compile for other GPUs
REHEARSED = "test_fill and 32-4 or inside_a or no_rows or no_tokens or no_dense or below and 16"  # a few of each file


@dataclass(frozen=True)
class Part:
    """A process: what it runs, and the seconds that it may take. ``method`` is for the training part."""

    name: str
    seconds: int
    script: str = ""
    method: str = ""


PARTS = [
    Part("gpu tests", 60),
    Part("train ours", 70, "train.py", "ours"),
    Part("train dense", 60, "train.py", "dense"),
    Part("linear", 110, "linear.py"),
    Part("experts", 60, "experts.py"),
    Part("train lora", 60, "train.py", "lora"),
    Part("decode", 50, "decode.py"),
    Part("train scales", 70, "train.py", "scales"),
    Part("train qlora", 60, "train.py", "qlora"),
    Part("train peft", 60, "train.py", "peft"),
    Part("tests", 90),  # sweeps over shapes and types, which compile for long
]


def run(part: Part, args: argparse.Namespace, seconds: float) -> str:
    """Run one part; returns how it ended. What it printed is in ``gpu_<name>.txt``."""
    command = [sys.executable, HERE / "gpu" / part.script, "--out", args.out, *(["--tiny"] if args.rehearse else [])]
    if args.bundle:
        command += ["--bundle", args.bundle]
    if not part.script:
        command = tests_command(part.name, args.rehearse)
    paths = [ROOT, HERE, *([args.bundle] if args.bundle else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "QALORA_CHECK_METHOD": part.method,
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if args.rehearse:
        environment["TRITON_INTERPRET"] = "1"
    log = args.out / f"gpu_{part.name.replace(' ', '_')}.txt"
    start = time.monotonic()
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=max(1, seconds)
            )
        except subprocess.TimeoutExpired:
            return f"cut off after {seconds:.0f} s"
    ended = "done" if done.returncode == 0 else f"exit status {done.returncode}, see {log.name}"
    return f"{ended} in {time.monotonic() - start:.0f} s"


def tests_command(part: str, rehearse: bool) -> list[str]:
    """pytest over what CUDA runs, first what is marked gpu; in several processes, which compile side by side."""
    command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--no-header", *TESTS]
    command += ["-k", REHEARSED if rehearse else NOT_HERE, *(["-m", "gpu"] if part == "gpu tests" else [])]
    try:
        import xdist  # noqa: F401 (asked for whether it is there)
    except ImportError:
        return command
    return command if rehearse else [*command, "-n", str(min(8, os.cpu_count() or 1))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="folder that gpu_bundle.py made")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of the CSVs and logs")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together")
    parser.add_argument("--parts", default="", help="only parts whose name has one of these words (comma-separated)")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, without CUDA")
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()):
        raise SystemExit("there is no CUDA device. Run this on a machine with one, or rehearse it: --rehearse.")
    if args.bundle and not (args.bundle / "vllm_ops.so.xz").is_file():
        raise SystemExit(f"{args.bundle} holds no vllm_ops.so.xz. Make it with benchmarks/gpu_bundle.py.")
    args.out.mkdir(parents=True, exist_ok=True)
    print(" · ".join(f"{name} {value}" for name, value in describe("triton", "transformers", "peft").items()))
    wanted = [word for word in args.parts.split(",") if word]
    deadline, failed = time.monotonic() + 60 * args.minutes, False
    for part in PARTS:
        if wanted and not any(word in part.name for word in wanted):
            continue
        if part.method == "qlora" and not has_bitsandbytes(args.bundle):
            print("train qlora: left out, bitsandbytes is not here", flush=True)
            continue
        left = deadline - time.monotonic()
        ended = run(part, args, min(left, part.seconds * (3 if args.rehearse else 1))) if left > 1 else "no time left"
        failed = failed or not ended.startswith("done")
        print(f"{part.name}: {ended}", flush=True)
    if args.rehearse:
        print("\nA rehearsal: that the parts ran is what counts, not these figures.")
    print_bars(args.out)
    return int(failed)


def has_bitsandbytes(bundle: Path | None) -> bool:
    command = [sys.executable, "-c", "import bitsandbytes"]
    environment = os.environ | {"PYTHONPATH": str(bundle or "")}
    return torch.cuda.is_available() and not subprocess.run(command, env=environment, capture_output=True).returncode


if __name__ == "__main__":
    sys.exit(main())
