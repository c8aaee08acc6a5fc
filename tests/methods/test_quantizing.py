"""What `qalora quantize` refuses before GPTQModel begins; a stand-in for it, which the training environment has not."""

import sys
from types import SimpleNamespace

import pytest
import torch
from support.fabricate import make_base, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.methods import quantizing
from qalora_plugin.methods.quantizing import plan_for, quantize

SEQUENCES = [list(range(4, 90)) * 2]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantizing")
    make_base(folder / "base", twin=folder / "dense")
    return folder / "dense"


@pytest.fixture
def refused(dense, tmp_path, monkeypatch):
    """The reason, and that it came before GPTQModel was asked for anything and left nothing."""

    def run(model=dense, out="out", text=__file__, **options):
        with pytest.raises(QALoraError) as caught:
            quantize(str(model), tmp_path / "place" / out, str(text), **options)
        assert not (tmp_path / "place").exists()
        return str(caught.value)

    monkeypatch.setattr(quantizing, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "gptqmodel", SimpleNamespace(GPTQModel=None, QuantizeConfig=None))
    return run


def test_places(refused, dense):
    assert "/proc is not writable" in refused(out="/proc/base")
    assert "which is the base's folder, or inside it" in refused(out=dense / "base")


def test_numbers(refused):
    assert "samples is 0, expected 1 or more" in refused(samples=0)
    assert "length is 1, expected 2 or more" in refused(length=1)
    for given in ({"bits": 4}, {"group_size": 32}):
        assert "a budget chooses bits and group sizes itself" in refused(budget=4.0, **given)


def test_models(refused, dense, merged, tmp_path):
    assert "is quantised already (qalora)" in refused(merged)
    small = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    assert "has no tokenizer that can be loaded" in refused(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    assert "is none of the 64 that" in refused(tmp_path / "small")


@pytest.mark.parametrize("budget", [1.5, float("nan")])
def test_a_budget_that_nothing_meets_is_refused_before_anything_is_measured(dense, monkeypatch, budget):
    monkeypatch.setattr(quantizing, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(QALoraError, match=r"cannot be met: the smallest choice everywhere takes 2\.47"):
        plan_for(dense, SEQUENCES, budget, False)


def test_budgets_that_would_not_count_everything(dense, tmp_path):
    """Experts, which are no linears; weights that are NaN, whose costs no order has."""
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, moe_intermediate_size=64, num_experts=2, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "experts")
    with pytest.raises(QALoraError, match=r"experts\.\w+ holds a mixture of experts, which it would not count"):
        plan_for(tmp_path / "experts", SEQUENCES, 4.0, False)
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "lost")
    with pytest.raises(QALoraError, match=r"layers\.1\.mlp\.up_proj holds NaN or Inf"):
        plan_for(tmp_path / "lost", SEQUENCES, 4.0, False)
