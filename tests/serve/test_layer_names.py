"""vLLM layers whose names are not their tensors': found all the same, and never taken for another's."""

from types import SimpleNamespace

import pytest
from support.vllm_layers import config_for, linear_tensors

from qalora_plugin.core.errors import QALoraError
from vllm_ext.config import QALoraConfig


def config(tmp_path, **groups):
    """The config of a checkpoint of linears with 32 outputs, by name: their group sizes."""
    modules = {name: linear_tensors(32, i, False, "gptq", size) for i, (name, size) in enumerate(groups.items())}
    return config_for(tmp_path, modules, "gptq")


def names(found: QALoraConfig, prefix: str) -> list[str]:
    return [part.name for part in found._parts(prefix)]


def test_fused_layers_of_classes_that_do_not_name_their_parts(tmp_path):
    """StableLM and GPT-J have no packed_modules_mapping."""
    found = config(tmp_path, **{f"h.0.attn.{part}_proj": 32 for part in "qkv"})
    found.packed_modules_mapping = {}
    assert names(found, "h.0.attn.qkv_proj") == [f"h.0.attn.{part}_proj" for part in "qkv"]


def test_a_layer_under_another_name_is_known_by_its_last(tmp_path):
    """vLLM builds Falcon-H1's mixers as ``model.<layers + i>.mixer``."""
    found = config(tmp_path, **{"model.layers.0.mamba.in_proj": 32, "model.layers.1.mamba.in_proj": 32})
    assert names(found, "model.2.mixer.in_proj") == ["model.layers.0.mamba.in_proj"]
    assert names(found, "model.2.mixer.out_proj") == []


def test_not_by_its_last_name_where_that_says_too_little(tmp_path):
    mixed = config(tmp_path, **{"a.0.in_proj": 32, "a.1.in_proj": 64})
    assert names(mixed, "b.0.in_proj") == []
    one = config(tmp_path, **{"a.0.in_proj": 32})
    one.weights = {"a.1.in_proj"}  # left dense
    assert names(one, "b.0.in_proj") == []
    assert names(one, "a.1.in_proj") == []


@pytest.mark.parametrize("architecture", ["BloomForCausalLM", "MiniCPM3ForCausalLM"])
def test_classes_that_cannot_take_packed_weights(tmp_path, architecture):
    found = config(tmp_path, **{"a.0.in_proj": 32})
    with pytest.raises(QALoraError, match=f"cannot serve a quantised {architecture}: vLLM .*export lora"):
        found.maybe_update_config(str(tmp_path), hf_config=SimpleNamespace(architectures=[architecture]))
