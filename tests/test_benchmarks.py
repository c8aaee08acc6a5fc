"""The benchmarks of training and merging run from end to end, on sizes that say nothing about speed."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_merge(tmp_path):
    command = [sys.executable, BENCHMARKS / "merge.py", "--sizes", "0.001", "--shape", "tiny", "--rounds", "1"]
    done = subprocess.run([*command, "--work", tmp_path, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "merge_cpu.csv").open()))
    assert [row["method"] for row in rows] == [
        "cp -r",
        "cp -al",
        "merge",
        "merge --copy",
        "merge()",
        "merge(copy=True)",
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert all(float(row["peak_mb"]) > 0 for row in rows[2:])
    assert [path.name for path in tmp_path.iterdir()] == ["merge_cpu.csv"]


def test_train_step(tmp_path):
    command = [sys.executable, BENCHMARKS / "train_step.py", "--scenarios", "short", "--methods", "dense,lora,ours"]
    command += ["--shape", "tiny", "--dtype", "float32", "--steps", "2", "--models", tmp_path / "models"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("train_step_*_float32.csv")
    rows = list(csv.DictReader(results.open()))
    assert [row["method"] for row in rows] == ["dense", "lora", "ours"]
    assert all(float(row["tokens_per_second"]) > 0 and float(row["peak_mb"]) > 0 for row in rows)
    assert results.with_suffix(".png").stat().st_size > 0


def test_a_step_of_experts():
    command = [sys.executable, BENCHMARKS / "moe_step.py", "--experts", "2", "--top-k", "1", "--tokens", "8"]
    done = subprocess.run([*command, "--steps", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(method in done.stdout for method in ("dense", "lora", "ours"))


@pytest.mark.parametrize("name", ["accuracy", "before_after", "gpu_bundle", "gpu_check", "sharded_loading"])
def test_those_that_are_too_long_to_run_here_start(name):
    """What they import is still there, under its name."""
    done = subprocess.run([sys.executable, BENCHMARKS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
