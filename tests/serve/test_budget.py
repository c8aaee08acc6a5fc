"""``qalora quantize --budget``: GPTQModel quantizes as the integer program says."""

import json

import pytest
from support.fabricate import make_base, make_tokenizer
from transformers import AutoModelForCausalLM

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.served_bits import served_bits
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


def test_what_gptqmodel_could_not_quantize_is_no_base(dense, tmp_path):
    """It says nothing, and writes NaN."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(QALoraError, match=r"up_proj\.scales holds NaN or Inf"):
        quantize(str(tmp_path / "dense"), tmp_path / "base", str(dense.parent / "text.jsonl"), samples=16, length=64)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}
