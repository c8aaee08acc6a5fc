"""Workers of the accuracy benchmark: what stops, or diverges, harms no other run."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.fabricate import make_base
from transformers import LlamaConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """``tuning``'s modules, by their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return SimpleNamespace(
        **{
            name: __import__(f"tuning.{name}", fromlist=[name])
            for name in ("jobs", "methods", "plan", "run", "summary")
        }
    )


@pytest.fixture
def benches(modules, tmp_path):
    """Two workers on one folder, and a 4-bit base."""
    make_base(tmp_path / "bases" / "4-32", twin=tmp_path / "model")
    return [modules.run.Bench(tmp_path, tmp_path / "runs", "cpu", sys.executable, 2) for _ in range(2)]


def test_a_rate_that_diverged_is_none(modules):
    plan = modules.plan
    rows = [vars(job) | {"loss": 0.7} for job in plan.first() if job.lr]
    for row in rows:
        if (row["method"], row["lr"]) == ("lora", plan.RATES["lora"][0]) or row["method"] == "peqa":
            row |= {"note": "ArithmeticError: the loss is nan"}
            del row["loss"]
    rates = plan.best_rates(rows)
    assert rates["lora"] == plan.RATES["lora"][1]
    assert "peqa" not in rates


def test_a_loss_that_is_none_is_not_measured(modules, benches, monkeypatch):
    found = iter([SimpleNamespace(loss=0.7, top1=0.5), SimpleNamespace(loss=float("nan"), top1=0.0)])
    monkeypatch.setattr(modules.run, "mean_loss", lambda *_, **__: next(found))
    monkeypatch.setattr(modules.run.rows, "read", lambda *_: [])
    monkeypatch.setattr(modules.run.rows, "prose", lambda *_: [])
    with pytest.raises(ArithmeticError, match=r"0\.7 on the task, nan on prose: it diverged"):
        benches[0].measure(torch.nn.Identity(), modules.jobs.Job("gsm8k", "lora"))


def test_what_a_worker_took_is_others_once_it_is_gone(benches):
    first, second = benches
    job = first.next_job("base-quantize-4-32-0-0")
    assert job.name == "base-quantize-4-32-0-0"
    assert second.next_job(job.name) is True  # it waits
    for mark in first.marks:  # as the system does, however a process ends
        mark.close()
    assert second.next_job(job.name) == job


def test_what_a_stopped_run_quantized_is_in_nobodys_way(modules, benches, monkeypatch, tmp_path):
    bench = benches[0]
    job = modules.jobs.Job("gsm8k", modules.jobs.REQUANTIZE, 4, 32, lr=0.01)
    (left := tmp_path / "runs" / "requantized" / job.name).mkdir(parents=True)
    trained = []

    def do_lora(model, job, batches):
        trained.append(job.method)
        return {}

    def quantize(model, out, job):
        shutil.copytree(tmp_path / "bases" / "4-32", out)  # fails where it is there
        return {}

    monkeypatch.setattr(bench, "train", do_lora)
    monkeypatch.setattr(bench, "batches", lambda job: [])
    monkeypatch.setattr(bench, "quantize", quantize)
    monkeypatch.setattr(bench, "measure", lambda model, job: {"loss": 1.0})
    for _ in range(2):  # the LoRA is trained once
        assert bench.do(job) == {"loss": 1.0}
        assert trained == ["lora"]
        assert not left.exists()


def test_whose_gradient_is_of_all_tokens(modules, tmp_path, monkeypatch):
    """Whatever ran before in the same process."""
    make_base(tmp_path / "bases" / "4-32", twin=tmp_path / "model")
    methods, job = modules.methods, modules.jobs.Job("gsm8k", "", 4, 32)
    monkeypatch.setattr(methods.scales, "GRADIENT_EVERY", methods.USUAL_EVERY)
    places = methods.Places(tmp_path, tmp_path / "bases", tmp_path / "adapter", tmp_path / "merged", "cpu")
    for name, every in (("scales", 4), ("peqa", 1), ("scales", 4), ("scales-all-tokens", 1), ("scales", 4)):
        model = methods.METHODS[name][0](job, places).train()
        layers = [layer for layer in model.modules() if isinstance(layer, methods.QALoraLayer)]
        deltas = {layer._scale_delta(["default"]).every for layer in layers}
        assert deltas == {every}


def test_scales_that_replace_those_of_the_base_take_no_bits(modules, tmp_path):
    config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=8)
    config.save_pretrained(tmp_path)
    bits = {
        method: modules.summary.bits_a_weight(modules.jobs.Job("gsm8k", method, 4, 32, lr=0.01), tmp_path)
        for method in ("lora-gptq", "peqa", "scales")
    }
    assert bits["lora-gptq"] == bits["peqa"] < bits["scales"]
