"""A budget for a whole model: what counts, and what is refused before it is measured."""

import pytest
import torch
from families.architectures import build
from support.fabricate import make_base
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.methods import quantizing, sensitivity
from qalora_plugin.methods.quantizing import plan_for

SEQUENCES = [list(range(4, 90)) * 2]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planning")
    make_base(folder / "base", twin=folder / "dense")
    return folder / "dense"


@pytest.fixture
def saved(tmp_path):
    def save(model):
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("budget", [1.5, float("nan")])
def test_a_budget_that_nothing_meets_is_refused_before_anything_is_measured(dense, monkeypatch, budget):
    monkeypatch.setattr(quantizing, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(QALoraError, match=r"cannot be met: the smallest choice everywhere takes 2\.48"):
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


def test_a_budget_of_a_model_without_linears(saved, monkeypatch):
    monkeypatch.setattr(quantizing, "Linear", torch.nn.Conv2d)
    small = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(QALoraError, match="holds no linears to spend a budget on"):
        plan_for(saved(LlamaForCausalLM(small)), SEQUENCES, 4.0, False)


@pytest.mark.parametrize("fisher", [False, True])
def test_a_budget_of_gpt2(saved, fisher):
    """Its linears are ``Conv1D``, whose weights lie the other way round."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=1, n_head=4))
    chosen = plan_for(saved(model), [list(range(4, 60))], 4.5, fisher)
    leaves = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert {name.partition("h.0.")[2] for name in chosen} == leaves


def test_a_budget_of_a_model_with_vision(saved, monkeypatch):
    """What is not quantized does not count, and what no text comes to is refused before costs are measured."""
    model = build("gemma3")
    folder, text = saved(model), [name for name, _ in model.named_modules() if ".language_model." in f".{name}"]
    found = plan_for(folder, SEQUENCES, 4.5, False, text)
    assert found.keys() <= set(text)
    assert len(found) == 7 * model.config.text_config.num_hidden_layers
    monkeypatch.setattr(sensitivity, "_costs", lambda *_: pytest.fail("measured"))
    with pytest.raises(QALoraError, match=r"vision\S+ is not reached by calibration text"):
        plan_for(folder, SEQUENCES, 4.5, False)
