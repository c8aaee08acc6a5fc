"""The merge benchmark runs from end to end, on a size that says nothing about speed."""

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_merge(tmp_path):
    command = [sys.executable, BENCHMARKS / "merge.py", "--sizes", "0.001", "--shape", "tiny", "--rounds", "1"]
    done = subprocess.run([*command, "--work", tmp_path, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "merge_cpu.csv").open()))
    assert [row["method"] for row in rows] == ["cp -r", "cp -al", "merge", "merge --copy"]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert all(float(row["peak_mb"]) > 0 for row in rows[2:])
    assert [path.name for path in tmp_path.iterdir()] == ["merge_cpu.csv"]
