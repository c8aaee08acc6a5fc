"""The accuracy benchmark runs from end to end, goes on where it stopped, and plans what it says."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.fabricate import make_base

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tuning(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("tuning.plan", fromlist=["plan"])


def tuned(plan, loss):
    """Results of all rates, each with ``loss(method, rate)``."""
    return [vars(job) | {"loss": loss(job.method, job.lr)} for job in plan.first() if job.lr]


def test_nothing_of_a_method_before_its_rate_is_known(tuning):
    assert not tuning.table([])
    results = tuned(tuning, lambda method, lr: abs(lr - 3e-3))
    assert tuning.best_rates(results) == dict.fromkeys(("lora", "offsets", "scales", "peqa"), 3e-3) | {"galore": 1e-3}
    only_lora = [row for row in results if row["method"] == "lora"]
    assert {job.method for job in tuning.table(only_lora)} == {"lora", "qlora", "lora-gptq"}


def test_every_need_is_a_job_before(tuning):
    jobs = tuning.jobs(tuned(tuning, lambda method, lr: lr))
    seen = set()
    for job in jobs:
        assert not job.needs or job.needs in seen
        assert job.name not in seen
        seen.add(job.name)
    by_method = {(job.task, job.method, job.base): 0 for job in jobs if job.lr}
    for job in jobs:
        if job.lr:
            by_method[job.task, job.method, job.base] += 1
    assert min(by_method.values()) >= 3


def test_batches_are_the_same_for_every_method(tuning):
    from tuning import rows

    from qalora_plugin.eval.examples import Example

    examples = [Example(list(range(length)), 1) for length in range(2, 72)]
    first, again = (rows.batches(examples, 4, 40, seed=1) for _ in range(2))
    assert first == again != rows.batches(examples, 4, 40, seed=2)
    once = [len(example.ids) for batch in first[:17] for example in batch]
    assert len(set(once)) == len(once) == 68  # all whole batches before any row is seen again
    batch = rows.collate(first[0])
    assert batch["input_ids"].shape[1] % 32 == 0
    assert (batch["labels"] != rows.IGNORED).sum() == sum(len(example.ids) - 1 for example in first[0])


def test_trains_measures_and_goes_on(tmp_path):
    work, gsm8k = tmp_path / "work", tmp_path / "gsm8k"
    make_base(work / "bases" / "4-32", twin=work / "model")
    gsm8k.mkdir()
    for part in ("train", "test"):
        rows = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(8)]
        (gsm8k / f"gsm8k_{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = {"task": "base", "method": "quantize", "bits": 4, "group_size": 32, "clip": False, "lr": 0.0, "seed": 0}
    results = work / "runs" / "results.jsonl"
    results.parent.mkdir()
    results.write_text(json.dumps(base) + "\n")
    command = [sys.executable, BENCHMARKS / "accuracy.py", "--work", work, "--out", tmp_path / "out", "--gsm8k", gsm8k]
    command += ["--limit", "2", "--only", "gsm8k-scales-4-32-0.01"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in results.read_text().splitlines()]
        assert [row["method"] for row in found] == ["quantize", "scales"]
        assert "note" not in found[1], found[1]
        assert {"loss", "top1", "prose", "step_seconds", "first_loss", "torch", "commit"} <= set(found[1])
    assert "| 4 bit g 32 | **offsets and scales** |" in done.stdout
    (row,) = csv.DictReader((tmp_path / "out" / "accuracy.csv").open())
    assert float(row["loss"]) == pytest.approx(found[1]["loss"], rel=1e-3)
    assert 5.1 < float(row["bits_a_weight"]) < 5.7
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 0
    assert not list((work / "runs" / "merged").iterdir())
    results.unlink()  # another machine: what stands in the table is not run again
    assert subprocess.run(command, capture_output=True).returncode == 0
    (again,) = map(json.loads, results.read_text().splitlines())
    assert again["loss"] == float(row["loss"])
    assert again["clip"] is False
    assert again["commit"] == row["commit"]
