"""What a benchmark ran on: the columns that every results file carries."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """Machine, commit and date of this run."""
    return {"machine": machine(), "commit": commit(), "date": datetime.date.today().isoformat()}


def machine() -> str:
    """GPU name, or CPU model and the cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """Short hash of the checkout, with + if it has uncommitted changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    done = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if done.returncode:
        return "unknown"
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    return done.stdout.strip() + ("+" if dirty else "")
