"""``qalora quantize --budget``: GPTQModel quantizes as the integer program says."""

import json
import re

import pytest
from support.fabricate import make_base, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from qalora_plugin.commands.cli import app
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.served_bits import served_bits
from qalora_plugin.methods.dense_source import GROUP_SIZES
from qalora_plugin.methods.quantizing import quantize


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    make_base(folder / "base", twin=folder / "dense")
    text = "".join(chr(97 + i * i % 26) for i in range(4000))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text[i : i + 64]}) for i in range(0, 4000, 64)))
    return folder / "dense"


@pytest.mark.parametrize("fisher", [False, True])
def test_base_is_what_was_planned(dense, tmp_path, fisher):
    budget = 4.3  # offsets included, which a base has none of yet
    text = dense.parent / "text.jsonl"
    base = quantize(str(dense), tmp_path / "base", str(text), samples=32, length=64, budget=budget, fisher=fisher)
    specs = QuantizedCheckpoint.open(base).specs
    kinds = {name: (spec.bits, spec.group_size) for name, spec in specs.items()}
    assert len(kinds) == 14
    assert len(set(kinds.values())) > 1
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert len({kinds[f"{attention}.{leaf}_proj"] for leaf in "qkv"}) == 1  # vLLM runs them as one
        assert kinds[f"{mlp}.gate_proj"] == kinds[f"{mlp}.up_proj"]
    weights = sum(spec.in_features * spec.out_features for spec in specs.values())
    offsets = sum(16 * spec.groups * spec.out_features for spec in specs.values()) / weights
    assert 3.5 < served_bits(specs.values()).bits_a_weight + offsets <= budget


def test_group_size_may_be_given(dense, tmp_path):
    text = str(dense.parent / "text.jsonl")
    base = quantize(str(dense), tmp_path / "base", text, samples=32, length=64, budget=4.3, group_size=32)
    specs = QuantizedCheckpoint.open(base).specs.values()
    assert {spec.group_size for spec in specs} == {32}
    assert len({spec.bits for spec in specs}) > 1


def test_the_command_says_what_was_chosen(dense, tmp_path):
    arguments = ["quantize", dense, tmp_path / "base", "--dataset", dense.parent / "text.jsonl", "--budget", "4.3"]
    result = CliRunner().invoke(app, [str(part) for part in [*arguments, "--samples", 32, "--length", 64]])
    assert result.exit_code == 0, result.output
    assert re.search(r"base: \d+ × \d bit, g \d+; \d.*; [34]\.\d+ bits a weight \(", result.output)


def test_gpt2(dense, tmp_path):
    """Whose linears are ``Conv1D``, and which has 64 positions."""
    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    text = str(dense.parent / "text.jsonl")
    base = quantize(str(tmp_path / "dense"), tmp_path / "base", text, samples=16, length=512, budget=4.3)
    specs = QuantizedCheckpoint.open(base).specs
    assert len(specs) == 8
    assert len({(spec.bits, spec.group_size) for spec in specs.values()}) > 1


@pytest.mark.parametrize("act_order", [False, True])
def test_one_group_a_column(dense, tmp_path, act_order):
    text = str(dense.parent / "text.jsonl")
    base = quantize(str(dense), tmp_path / "base", text, samples=16, length=64, group_size=-1, act_order=act_order)
    assert {spec.groups for spec in QuantizedCheckpoint.open(base).specs.values()} == {1}


def test_group_sizes_are_those_of_gptqmodel():
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    assert sorted(TorchLinear.SUPPORTS_GROUP_SIZE) == [-1, *GROUP_SIZES]


def test_it_says_what_it_will_quantize(dense, tmp_path):
    """And so does what is refused before it begins: o_proj has 48 inputs."""
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=12)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(QALoraError, match=r"divide the 48 inputs of model\.layers\.0\.self_attn\.o_proj"):
        quantize(str(tmp_path / "dense"), tmp_path / "base", str(dense.parent / "text.jsonl"))
