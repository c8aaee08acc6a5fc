"""Runs a script, or ``axolotl train``, as two processes on a CPU."""

import json
import subprocess
from pathlib import Path

from support.axolotl_runs import BIN, ENVIRONMENT

_ADDRESS = ("--standalone", "--nproc_per_node", "2")


def launch(*arguments: str | Path, code: int = 0, timeout: int = 600) -> str:
    """Run a Python script with its arguments as two processes; returns their output, of both in one."""
    program = (BIN / "python", "-m", "torch.distributed.run", *_ADDRESS)
    done = subprocess.run(
        [str(argument) for argument in (*program, *arguments)],
        capture_output=True, text=True, env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, timeout=timeout,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == (code != 0), output[-8000:]
    return output


def train_as_two(config: Path, **options) -> str:
    """``axolotl train``; each rank leaves a report beside the config, see :func:`report`."""
    return launch(Path(__file__).with_name("axolotl_process.py"), config, **options)


def report(config: Path, rank: int) -> dict:
    """What a rank found when training began: ``mode``, ``backend``, ``model``, ``packed`` and ``here`` (bytes)."""
    return json.loads((config.parent / f"rank{rank}.json").read_text())
