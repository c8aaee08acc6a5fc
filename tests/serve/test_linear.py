"""The linear method inside vLLM's own layers, loaded through their weight loaders, against ``quant/reference.py``."""

import pytest
import torch
from support.hardware import HAS_KERNEL, needs_kernel
from support.vllm_layers import (
    COMPUTE,
    HEAD,
    HEADS,
    KV_HEADS,
    SIZES,
    K,
    KernelWithoutZeros,
    assert_close,
    config_for,
    expected,
    linear_tensors,
    load,
    run_qkv,
)  # fmt: skip
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.qalora import QALora
from vllm_ext import ops
from vllm_ext.kernels import select
from vllm_ext.linear import QALoraLinearMethod

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("act_order", ["none", "shared", "per part"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
def test_fused_qkv_equals_reference(tmp_path, sym, checkpoint_format, act_order, group_size, compute):
    dtype, path = compute
    orders = {"none": [None] * 3, "shared": [5, 5, 5], "per part": [5, 6, 7]}[act_order]
    parts = {
        part: linear_tensors(size, seed, sym, checkpoint_format, group_size, order_seed=order)
        for seed, ((part, size), order) in enumerate(zip(SIZES.items(), orders, strict=True))
    }
    sortable = act_order != "per part" or group_size == -1
    if path == "kernel+offsets" and not (sortable and HAS_KERNEL):
        with pytest.raises(QALoraError, match=r"attn\.qkv_proj cannot be served by the path kernel\+offsets"):
            run_qkv(tmp_path, parts, checkpoint_format, dtype, path=path)
        return
    layer, y, wanted = run_qkv(tmp_path, parts, checkpoint_format, dtype, path=path)
    assert_close(y, wanted)
    has_kernel = HAS_KERNEL or dtype == torch.bfloat16  # torch's, on any CPU
    assert (layer.quant_method.kernel is not None) == (path != "dense" and sortable and has_kernel)


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_inputs_of_any_layout(tmp_path, compute):
    """Columns of another tensor; no row at all."""
    dtype, path = compute
    if path == "kernel+offsets" and not HAS_KERNEL:
        pytest.skip("vLLM has no kernel on this CPU: tested where it has")
    parts = {part: linear_tensors(size, seed, False, "gptq", 32) for seed, (part, size) in enumerate(SIZES.items())}
    layer, _, _ = run_qkv(tmp_path, parts, "gptq", dtype, path=path)
    x = torch.randn(K, 9, generator=torch.Generator().manual_seed(3)).to(dtype).t()
    assert_close(layer(x)[0], torch.cat([expected(x, part, "gptq") for part in parts.values()], dim=-1))
    assert layer(x[:0])[0].shape == (0, sum(SIZES.values()))


@pytest.mark.parametrize("compute", [COMPUTE[0], COMPUTE[-1]], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bit_widths(tmp_path, bits, compute):
    dtype, path = compute
    parts = {
        part: linear_tensors(size, seed, False, "gptq", 64, bits=bits)
        for seed, (part, size) in enumerate(SIZES.items())
    }
    _, y, wanted = run_qkv(tmp_path, parts, "gptq", dtype, bits, path)
    assert_close(y, wanted)


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_that_the_kernel_does_not_take_go_into_the_offsets(tmp_path, monkeypatch, bits, dtype, adapted):
    monkeypatch.setattr(select, "find_kernel", lambda bits, *_: KernelWithoutZeros(bits, dtype))
    monkeypatch.setattr(ops, "_SMALLEST", 1 << 40)  # in float32 on a CPU, too
    parts = {
        part: linear_tensors(size, seed, False, "gptq", 64, bits, offset_dtype=torch.float16 if adapted else None)
        for seed, (part, size) in enumerate(SIZES.items())
    }
    path = "kernel+offsets" if adapted else None
    layer, y, wanted = run_qkv(tmp_path, parts, "gptq", dtype, bits, path)
    assert layer.offsets.dtype == torch.float32
    assert_close(y, wanted)


@pytest.mark.parametrize("adapted", [pytest.param("q", marks=needs_kernel), pytest.param("qv", marks=needs_kernel), ""])
def test_parts_without_offsets(tmp_path, adapted):
    parts = {
        part: linear_tensors(size, seed, False, "gptq", 32, offset_dtype=torch.float16 if part in adapted else None)
        for seed, (part, size) in enumerate(SIZES.items())
    }
    layer, y, wanted = run_qkv(tmp_path, parts, "gptq", torch.bfloat16, path="kernel+offsets" if adapted else None)
    assert_close(y, wanted)
    assert (layer.offsets is None) == (not adapted)


def test_offsets_that_are_all_zero_stay(tmp_path):
    """Values may change with ``reload_weights``; whether a layer has offsets must not."""
    parts = {part: linear_tensors(size, 0, True, "gptq", 32) for part, size in SIZES.items()}
    for tensors in parts.values():
        tensors["offsets"].zero_()
    layer, y, wanted = run_qkv(tmp_path, parts, "gptq", torch.bfloat16, path="dense")
    assert layer.offsets is not None
    assert_close(y, wanted)


@needs_kernel
def test_float32_offsets_are_not_rounded(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "_SMALLEST", 1 << 40)  # but by the compiled kernel of a CPU
    parts = {
        part: linear_tensors(size, seed, True, "gptq", 32, offset_dtype=torch.float32)
        for seed, (part, size) in enumerate(SIZES.items())
    }
    layer, y, wanted = run_qkv(tmp_path, parts, "gptq", torch.bfloat16, path="kernel+offsets")
    assert torch.equal(layer.offsets, torch.cat([tensors["offsets"] for tensors in parts.values()], dim=1))
    assert_close(y, wanted)


@needs_kernel
def test_symmetry_is_read_off_the_zeros(tmp_path):
    """A config that claims the wrong ``sym`` (here: none at all) changes nothing: 4-bit zeros of 8 are symmetric."""
    for sym in (True, False):
        folder = tmp_path / str(sym)
        folder.mkdir()
        parts = {part: linear_tensors(size, 0, sym, "gptq", 32) for part, size in SIZES.items()}
        layer, _, _ = run_qkv(folder, parts, "gptq", torch.bfloat16, path="kernel+offsets")
        assert layer.quant_method.kernel.config.zero_points == (not sym)


@pytest.mark.parametrize("compute", [case for case in COMPUTE if HAS_KERNEL or case[1] != "kernel+offsets"], ids=str)
def test_row_parallel_with_act_order_on_one_rank(tmp_path, compute):
    dtype, path = compute
    tensors = linear_tensors(128, 0, False, "gptq", 64, order_seed=3)
    config = config_for(tmp_path, {"o_proj": tensors}, "gptq", path)
    layer = RowParallelLinear(K, 128, params_dtype=dtype, quant_config=config, prefix="o_proj")
    load(layer, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, 3, K).to(dtype)
    assert_close(layer(x)[0], expected(x, tensors, "gptq"))


def share_of(module, k):
    """A row-parallel layer's first rank of K/k, created as vLLM does it."""
    layer = RowParallelLinear(K, 128, bias=False, quant_config=None)
    layer.quant_method = QALoraLinearMethod("o_proj", [module], QALora({"checkpoint_format": "gptq"}))
    layer.quant_method.create_weights(layer, k, [128], K, 128, torch.bfloat16, weight_loader=layer.weight_loader_v2)
    return layer


def test_group_split_by_tensor_parallelism_is_refused(tmp_path):
    config = config_for(tmp_path, {"o_proj": linear_tensors(128, 0, True, "gptq", 64)}, "gptq")
    with pytest.raises(QALoraError, match=r"o_proj.* 32 of 256 input columns.*group size 64.*divides 4"):
        share_of(config.modules["o_proj"], 32)


def test_act_order_across_ranks_is_refused(tmp_path):
    tensors = linear_tensors(128, 0, True, "gptq", 64, order_seed=3)
    layer = share_of(config_for(tmp_path, {"o_proj": tensors}, "gptq").modules["o_proj"], 128)
    load(layer, {name: tensor for name, tensor in tensors.items() if name != "bias"})
    with pytest.raises(QALoraError, match=r"o_proj.*act-order.*tensor-parallel-size 1"):
        layer.quant_method.process_weights_after_loading(layer)


def test_damaged_g_idx_is_refused(tmp_path):
    tensors = linear_tensors(128, 0, True, "gptq", 64)
    tensors["g_idx"][0] = 1
    layer = share_of(config_for(tmp_path, {"o_proj": tensors}, "gptq").modules["o_proj"], K)
    load(layer, {name: tensor for name, tensor in tensors.items() if name != "bias"})
    with pytest.raises(QALoraError, match="g_idx does not put exactly 64 columns"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["offsets", "scales"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, part, name, bad):
    parts = {part: linear_tensors(size, 0, False, "gptq", 32) for part, size in SIZES.items()}
    parts[part][name][3, -1] = bad
    with pytest.raises(QALoraError, match=rf"^attn\.{part}_proj\.{name} holds NaN or Inf \(served as attn\.qkv_proj\)"):
        run_qkv(tmp_path, parts, "gptq", torch.bfloat16)


def test_fused_parts_quantized_differently_are_refused(tmp_path):
    parts = {
        f"{part}_proj": linear_tensors(64, 0, True, "gptq", g) for part, g in zip("qkv", (32, 32, 64), strict=True)
    }
    config = config_for(tmp_path, parts, "gptq")
    with pytest.raises(QALoraError, match=r"v_proj: 4 bits, group size 64"):
        QKVParallelLinear(K, HEAD, HEADS, KV_HEADS, quant_config=config, prefix="qkv_proj")


def test_fused_parts_partly_dense_are_refused(tmp_path):
    parts = {"q_proj": linear_tensors(64, 0, True, "gptq", 32), "k_proj": {"weight": torch.zeros(32, K)}}
    config = config_for(tmp_path, parts, "gptq")
    with pytest.raises(QALoraError, match="quantises only q_proj"):
        QKVParallelLinear(K, HEAD, HEADS, KV_HEADS, quant_config=config, prefix="qkv_proj")


def test_reloaded_weights_of_another_kind(tmp_path):
    parts = {part: linear_tensors(size, 0, True, "gptq", 32) for part, size in SIZES.items()}
    layer, _, _ = run_qkv(tmp_path, parts, "gptq", torch.bfloat16, path="dense")
    other = QKVParallelLinear(
        K, HEAD, HEADS, KV_HEADS, bias=True, params_dtype=torch.bfloat16, prefix="attn.qkv_proj",
        quant_config=config_for(tmp_path, {f"attn.{part}_proj": parts[part] for part in parts}, "gptq", "dense"),
    )  # fmt: skip
    for part, size in SIZES.items():
        load(other, linear_tensors(size, 0, False, "gptq", 32), part)
    with pytest.raises(
        QALoraError, match=r"reloaded weights are of another kind \(4-bit asymmetric .* Start the server"
    ):
        layer.quant_method.process_weights_after_loading(other)
