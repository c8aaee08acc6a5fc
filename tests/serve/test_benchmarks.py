"""The serving benchmarks run from end to end, on sizes that say nothing about speed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.hardware import needs_kernel

pytestmark = [pytest.mark.e2e, needs_kernel]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script, results, *arguments):
    """Rows of the CSV that one benchmark wrote."""
    command = [sys.executable, BENCHMARKS / script, "--results", results, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    with results.open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["machine"] and row["vllm"] and row["commit"] for row in rows)
    return rows


def test_serve(tmp_path):
    variants = ["stock", "merged:kernel+offsets"]
    size = ("--size", "2m", "--rounds", 1, "--concurrency", 1, 3, "--output", 4)
    options = ("--variants", ",".join(variants), "--options", '{"enforce_eager": true}')
    rows = run("serve.py", tmp_path / "serve.csv", *size, *options)
    assert [(row["variant"], row["concurrency"]) for row in rows] == [(v, c) for v in variants for c in "13"]
    assert all(float(row[name]) > 0 for row in rows for name in ("tokens_per_s", "ttft_ms", "load_s"))


def test_gemm(tmp_path):
    size = ("--shapes", "256x128", "--rows", 1, 129, "--group-sizes", 64, "--repeats", 2)
    rows = run("gemm.py", tmp_path / "gemm.csv", *size)
    assert [row["rows"] for row in rows] == ["1", "129"]
    assert all(float(row[name]) > 0 for row in rows for name in ("kernel", "offsets", "fused", "bf16"))
