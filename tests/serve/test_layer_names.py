"""vLLM layers whose names are not their tensors': found all the same, and never taken for another's."""

from types import SimpleNamespace

import pytest
import torch
from support.vllm_layers import K, assert_close, config_for, expected, finished, linear_tensors, load
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from qalora_plugin.core.errors import QALoraError
from vllm_ext.config import QALoraConfig

PLAIN = {"offset_dtype": None}


def config(tmp_path, **groups):
    """The config of a checkpoint of linears with 32 outputs, by name: their group sizes."""
    modules = {name: linear_tensors(32, i, False, "gptq", size) for i, (name, size) in enumerate(groups.items())}
    return config_for(tmp_path, modules, "gptq")


def names(found: QALoraConfig, prefix: str) -> list[str]:
    return [part.name for part in found._parts(prefix)]


def alike(found: QALoraConfig, prefix: str) -> list[str]:
    return [part.name for part in found._parts_by_leaf(prefix, K)]


def test_fused_layers_of_classes_that_do_not_name_their_parts(tmp_path):
    """StableLM and GPT-J have no packed_modules_mapping."""
    found = config(tmp_path, **{f"h.0.attn.{part}_proj": 32 for part in "qkv"})
    found.packed_modules_mapping = {}
    assert names(found, "h.0.attn.qkv_proj") == [f"h.0.attn.{part}_proj" for part in "qkv"]


def test_a_layer_under_another_name_is_known_by_its_last(tmp_path):
    """vLLM builds Falcon-H1's mixers as ``model.<layers + i>.mixer``."""
    found = config(tmp_path, **{"model.layers.0.mamba.in_proj": 32, "model.layers.1.mamba.in_proj": 32})
    assert alike(found, "model.2.mixer.in_proj") == ["model.layers.0.mamba.in_proj"]
    assert alike(found, "model.2.mixer.out_proj") == []
    assert found._parts_by_leaf("model.2.mixer.in_proj", K + 32) == []


def test_not_by_its_last_name_where_that_says_too_little(tmp_path):
    mixed = config(tmp_path, **{"a.0.in_proj": 32, "a.1.in_proj": 64})
    assert alike(mixed, "b.0.in_proj") == []
    one = config(tmp_path, **{"a.0.in_proj": 32})
    one.weights = {"a.1.in_proj"}  # left dense
    assert alike(one, "b.0.in_proj") == []
    assert alike(one, "a.1.in_proj") == []


def test_a_layer_that_the_checkpoint_knows_as_dense_is_none_that_is_called_alike(tmp_path):
    """GLM's vision towers: vLLM fuses there what is stored apart, and what the language model stores in one piece."""
    found = config(
        tmp_path, **{"layers.0.mlp.gate_up_proj": 32, **{f"layers.0.attn.{part}_proj": 32 for part in "qkv"}}
    )
    found.packed_modules_mapping["gate_up_proj"] = ["gate_up_proj"]
    dense = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "attn.qkv.weight", "attn.in_proj_weight")
    norms = {f"{where}.norm1.weight": 1 for where in ("visual.blocks.0", "mtp.0.mlp")}
    found._take_tensors({**found.tensors, **norms, **{f"visual.blocks.0.{name}": 2 for name in dense}})
    assert alike(found, "visual.blocks.0.mlp.gate_up_proj") == alike(found, "visual.blocks.0.attn.qkv_proj") == []
    assert alike(found, "mtp.0.mlp.gate_up_proj") == ["layers.0.mlp.gate_up_proj"]


@pytest.mark.parametrize("kind", [{}, {"scales_dtype": torch.float16}, {"rank": 2}, {"order_seed": 3}], ids=str)
@pytest.mark.usefixtures("one_rank")
def test_one_without_an_adapter_is_served_without(tmp_path, monkeypatch, kind):
    """It is taken for an adapted one that is called alike, whose tensors it lacks; memory is dirty where it is new."""
    adapted, plain = (linear_tensors(64, seed, False, "gptq", 64, **one) for seed, one in enumerate((kind, PLAIN)))
    found = config_for(tmp_path, {"layers.0.mamba.in_proj": adapted, "layers.1.mamba.in_proj": plain}, "gptq", "dense")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(1))
    layer = ColumnParallelLinear(K, 64, params_dtype=torch.float32, quant_config=found, prefix="model.3.mixer.in_proj")
    monkeypatch.undo()
    load(layer, plain)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, K)
    assert_close(layer(x)[0], expected(x, plain, "gptq"))


@pytest.mark.parametrize("factored", [0, 2])
@pytest.mark.parametrize("order", [None, 3])
@pytest.mark.usefixtures("one_rank")
def test_one_linear_that_vllm_takes_apart(tmp_path, order, factored):
    """Qwen3.5: ``in_proj_qkv`` is three of the four outputs of ``in_proj_qkvz``."""
    sizes = {"in_proj_qkv": 96, "in_proj_z": 64}
    parts = {
        name: linear_tensors(size, seed, False, "gptq", 64, order_seed=order, rank=factored)
        for seed, (name, size) in enumerate(sizes.items())
    }
    found = config_for(tmp_path, parts, "gptq", "dense")
    found.packed_modules_mapping = {"in_proj_qkvz": list(parts)}
    layer = MergedColumnParallelLinear(
        K, [32, 32, 32, 64], params_dtype=torch.float32, quant_config=found, prefix="in_proj_qkvz"
    )
    finished(layer, parts, [(0, 1, 2), 3])
    x = torch.randn(5, K)
    assert_close(layer(x)[0], torch.cat([expected(x, one, "gptq") for one in parts.values()], dim=1))
    with pytest.raises(QALoraError, match=r"outputs of \[48, 64, 48\] columns .*in_proj_qkv: 96, in_proj_z: 64"):
        MergedColumnParallelLinear(K, [48, 64, 48], quant_config=found, prefix="in_proj_qkvz")


def test_a_quantized_head_without_a_name(tmp_path, one_rank):
    found = config(tmp_path, lm_head=32)
    with pytest.raises(QALoraError, match="lm_head is quantised, but this model's class builds its head without"):
        ParallelLMHead(64, K, quant_config=found)


@pytest.mark.parametrize(
    "architecture", ["BloomForCausalLM", "MiniCPM3ForCausalLM", "DeepseekForCausalLM", "Molmo2ForConditionalGeneration"]
)
def test_classes_that_cannot_take_packed_weights(tmp_path, architecture):
    found = config(tmp_path, **{"a.0.in_proj": 32})
    with pytest.raises(QALoraError, match=f"cannot serve a quantised {architecture}: vLLM .*export lora"):
        found.maybe_update_config(str(tmp_path), hf_config=SimpleNamespace(architectures=[architecture]))
