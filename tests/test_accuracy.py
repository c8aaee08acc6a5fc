"""The accuracy benchmark runs from end to end, goes on where it stopped, and plans what it says."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.fabricate import make_base
from transformers import LlamaConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tuning(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__("tuning.plan", fromlist=["plan"])


def tuned(plan, loss):
    """Results of all rates, each with ``loss(method, rate)``."""
    return [vars(job) | {"loss": loss(job.method, job.lr), "prose": 3.0} for job in plan.first() if job.lr]


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
    by_method = {(job.task, job.method, job.base, job.rank): 0 for job in jobs if job.lr}
    for job in jobs:
        if job.lr:
            by_method[job.task, job.method, job.base, job.rank] += 1
    assert min(by_method.values()) >= 3


def test_a_smaller_rank_is_another_run_with_fewer_bits(tuning, tmp_path):
    from tuning import summary

    config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=8)
    config.save_pretrained(tmp_path)
    jobs = [job for job in tuning.jobs(tuned(tuning, lambda method, lr: lr)) if job.method == "offsets"]
    (small, *_), usual = ([job for job in jobs if (job.base, job.rank) == ("4-32", rank)] for rank in (4, 16))
    (usual,) = (job for job in usual if job.lr == small.lr and job.seed == small.seed)
    assert small.name != usual.name
    sizes = [summary.bits_a_weight(job, tmp_path) for job in (small, usual)]
    assert sizes[0] < sizes[1]
    rows = summary.with_bits([vars(job) | {"loss": 0.7, "prose": 3.0} for job in (small, usual)], tmp_path)
    before = [{name: value for name, value in rows[1].items() if name != "rank"}]  # written before ranks were
    assert [summary.job_of(row) for row in before] == [usual]
    said = summary.markdown(summary.cells(rows))
    assert "| QA-LoRA (offsets) |" in said
    assert "| QA-LoRA (offsets), rank 4 |" in said


def test_the_table_of_what_has_been_run_needs_no_model(tmp_path):
    """Of the CSV that is in the repository, in a fresh clone."""
    shutil.copyfile(BENCHMARKS / "results" / "accuracy.csv", tmp_path / "accuracy.csv")
    command = [sys.executable, BENCHMARKS / "accuracy.py", "--summary", "--work", tmp_path / "none", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| 4 bit g 32 | **offsets and scales** | 0.6896 ± 0.0012 |" in done.stdout
    assert (tmp_path / "accuracy.csv").read_text() == (BENCHMARKS / "results" / "accuracy.csv").read_text()


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


def rehearsed(work: Path, gsm8k: Path, *arguments: str, code: int = 0) -> str:
    """Run the benchmark with two steps and rows; ``work`` gets a model."""
    gsm8k.mkdir(exist_ok=True)
    for part in ("train", "test"):
        rows = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(8)]
        (gsm8k / f"gsm8k_{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, BENCHMARKS / "accuracy.py", "--work", work, "--gsm8k", gsm8k, "--limit", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def read(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_trains_measures_and_goes_on(tmp_path):
    work = tmp_path / "work" / "rehearsal"
    make_base(work / "bases" / "4-32", twin=work / "model")
    results, table = work / "runs" / "results.jsonl", tmp_path / "out" / "accuracy.csv"
    arguments = (tmp_path / "work", tmp_path / "gsm8k", "--out", tmp_path / "out", "--only", "gsm8k-scales-4-32-0.01")
    for _ in range(2):
        said = rehearsed(*arguments)
        found = sorted(read(results), key=lambda row: row["method"])
        assert [row["method"] for row in found] == ["quantize", "scales"]
        assert "note" not in found[1], found[1]
        assert {"loss", "top1", "prose", "step_seconds", "first_loss", "torch", "commit"} <= set(found[1])
    assert "| 4 bit g 32 | **offsets and scales** |" in said
    (row,) = csv.DictReader(table.open())
    assert float(row["loss"]) == pytest.approx(found[1]["loss"], rel=1e-3)
    assert 5.1 < float(row["bits_a_weight"]) < 5.7
    assert table.with_suffix(".png").stat().st_size > 0
    assert not list((work / "runs" / "merged").iterdir())
    # Another machine: what stands in the table is not run again, and stays in it beside what was found here.
    other = row | {"lr": "0.003", "seed": "2"}
    with table.open("a", newline="") as file:
        csv.DictWriter(file, list(row), lineterminator="\n").writerow(other)
    rehearsed(*arguments, "--summary")
    assert {line["seed"] for line in csv.DictReader(table.open())} == {"0", "2"}
    results.unlink()
    rehearsed(*arguments)
    again = {row["seed"]: row for row in read(results)}
    assert again[0]["loss"] == float(row["loss"])
    assert again[0]["clip"] is False
    assert again[2]["commit"] == row["commit"]


def test_what_failed_is_said_and_tried_again(tmp_path):
    work = tmp_path / "work" / "rehearsal"
    make_base(tmp_path / "base", twin=work / "model")
    arguments = (tmp_path / "work", tmp_path / "gsm8k", "--only", "gsm8k-offsets-4-32-0.01")
    said = rehearsed(*arguments, "--quantizer", sys.executable + "-none", code=1)  # the default --out: not the repo's
    assert "These failed, and what needs them was left out:\nbase-quantize-4-32-0-0: FileNotFoundError" in said
    (work / "bases").mkdir(exist_ok=True)
    (tmp_path / "base").rename(work / "bases" / "4-32")  # as a quantizer that is there would
    rehearsed(*arguments)
    found = read(work / "runs" / "results.jsonl")
    assert [(row["method"], "note" in row) for row in found] == [("quantize", False), ("offsets", False)]
    assert (work / "accuracy.csv").is_file()


def test_heals_what_a_lora_left(tmp_path, tuning):
    """Half the steps a LoRA, quantized (here by a base that is ready), half the steps ours."""
    work = tmp_path / "work" / "rehearsal"
    make_base(tmp_path / "base", bits=3, twin=work / "model")
    quantizer = tmp_path / "quantizer"
    quantizer.write_text(f'#!/bin/sh\ntest -f "$3/model.safetensors" && cp -r {tmp_path / "base"} "$4"\n')
    quantizer.chmod(0o755)
    tuning.write(work / "runs" / "results.jsonl", tuned(tuning, lambda method, lr: lr))
    name = "gsm8k-lora-gptq-scales-3-32-mse-gptaq-0.003-0"
    rehearsed(tmp_path / "work", tmp_path / "gsm8k", "--quantizer", quantizer, "--only", name)
    (found,) = (row for row in read(work / "runs" / "results.jsonl") if row["method"] == "lora-gptq-scales")
    assert "note" not in found, found
    assert found["steps"] == 2
    assert found["loss"] > 0
    assert not list((work / "runs" / "requantized").iterdir())
