"""The Triton kernels against ``quant/reference.py``: interpreted without a GPU, compiled with one."""

from pathlib import Path

import pytest
import torch
from support.layers import adapter_for, assert_close, column_groups, delta, make_layer, reference_weight
from support.nvidia_machine_code import run_uninterpreted

from qalora_plugin.core import reference
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels.pooling import pool
from qalora_plugin.kernels.triton import dequantize, pooling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest weight or output. Weights are worked out in float32 and rounded once; to bfloat16, Triton's interpreter
# truncates instead, twice the error.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3}


def weight_and_offsets(layer, with_adapter):
    """The reference's effective weight in float64, and the offsets that the kernels add."""
    weight = reference_weight(layer)
    if not with_adapter:
        return weight, layer.offsets
    lora_a, lora_b = (t.detach() for t in adapter_for(layer, 4, torch.float32))
    group = column_groups(layer)
    added = reference.adapter_offsets(lora_a, lora_b, 0.5)[group]
    return weight + added, delta(lora_a, lora_b, 0.5).materialize(layer.offsets)


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group_size", [6, 24, 32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fill(bits, group_size, fmt, act_order, with_adapter):
    """160 columns fill no tile evenly, groups of 24 no period of 3 bits, groups of 6 no period at all."""
    layer = make_layer(96, 160, bits, group_size, fmt, act_order, offsets=with_adapter)
    expected, offsets = weight_and_offsets(layer, with_adapter)
    layer = layer.to(DEVICE)
    offsets = None if offsets is None else offsets.to(DEVICE)
    for dtype in TOLERANCE if group_size == 32 else [torch.float32]:
        out = torch.full((96, 160), float("nan"), dtype=dtype, device=DEVICE)
        dequantize.fill(layer.quantized, offsets, out)
        assert_close(out.cpu(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_fill_with_other_scales(scale_dtype):
    layer = make_layer(64, 32, 4, 32)
    layer.scales = layer.scales.to(scale_dtype)
    out = torch.empty(64, 32, device=DEVICE)
    dequantize.fill(layer.to(DEVICE).quantized, None, out)
    assert_close(out.cpu(), reference_weight(layer.cpu()), TOLERANCE[torch.float32])


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("shape", [(256, 96, 32), (192, 160, 96), (192, 32, -1), (64, 64, 16)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_matmul(bits, shape, tokens):
    in_features, out_features, group_size = shape
    group_size = max(group_size, codes_per_period(bits))  # a group holds whole periods, or takes_matmul refuses
    layer = make_layer(in_features, out_features, bits, group_size, offsets=True)
    weight, offsets = weight_and_offsets(layer, True)
    layer = layer.to(DEVICE)
    for dtype in TOLERANCE:
        x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
        assert dequantize.takes_matmul(tokens, layer.quantized)
        y = dequantize.matmul(x, layer.quantized, offsets.to(DEVICE))
        assert y.dtype == dtype
        # y is rounded; the products add up in float32
        assert_close(y.cpu(), x.cpu().double() @ weight, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("groups", "group_size"), [(3, 24), (5, 32), (2, 1200)])
def test_pool(groups, group_size, dtype):
    """Groups of 24 and 1200 fill no tile; rows lie apart where x is a part of something wider."""
    wide = torch.randn(7, groups * group_size + 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = wide[:, : groups * group_size]
    expected = reference.pool(x.double(), torch.arange(groups * group_size) // group_size, groups)
    for given in (x.to(DEVICE), x.contiguous().view(1, 7, -1).to(DEVICE)):
        found = pooling.pool(given, groups, dtype, divisor=4)
        assert found.shape == (*given.shape[:-1], groups)
        assert_close(4 * found.cpu().view(7, groups), expected, TOLERANCE[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("act_order", [False, True])
def test_pool_is_differentiable(act_order):
    """As the second path of an adapter with dropout needs it."""
    layer = make_layer(256, 32, 4, 32, act_order=act_order).cuda()
    x = torch.randn(2, 3, 256, device="cuda", requires_grad=True)
    dy = torch.randn(2, 3, 8, device="cuda")
    (found,) = torch.autograd.grad(pool(x, layer.quantized), x, dy)
    (expected,) = torch.autograd.grad(reference.pool(x, column_groups(layer), 8), x, dy)
    assert torch.equal(found, expected)


def test_matmul_keeps_the_leading_dimensions():
    layer = make_layer(64, 32, 4, 32).to(DEVICE)
    x = torch.randn(2, 3, 64, device=DEVICE)
    torch.testing.assert_close(dequantize.matmul(x, layer.quantized, None), layer(x), rtol=1e-5, atol=1e-5)
    assert not dequantize.takes_matmul(0, layer.quantized)
    assert not dequantize.takes_matmul(9, layer.quantized)
    assert not dequantize.takes_matmul(1, make_layer(64, 32, 3, 16).quantized)


def test_kernels_compile_for_nvidia_gpus():
    """What the interpreter accepts, the compiler may not; and whether loads and stores are wide shows in its code."""
    run_uninterpreted(Path(__file__).with_name("compile_gpu_kernels.py"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 48, 500])
@pytest.mark.parametrize(
    ("bits", "group_size", "act_order"), [(4, 32, False), (4, 128, False), (3, 32, False), (4, 32, True)]
)
def test_layer_on_cuda(bits, group_size, act_order, tokens):
    """Forward and backward with an adapter, through whichever path was measured to be faster."""
    layer = make_layer(1024, 512, bits, group_size, act_order=act_order, offsets=True)
    weight = reference_weight(layer).cuda()
    lora_a, lora_b = (t.detach().cuda().requires_grad_() for t in adapter_for(layer, 8, torch.float32))
    layer, x = layer.cuda(), torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x, delta(lora_a, lora_b, 0.5))
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, lora_a, lora_b), dy)
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, lora_a, lora_b))
    y64 = reference.adapter_linear(x64, weight, column_groups(layer), a64, b64, 0.5)
    expected = torch.autograd.grad(y64, (x64, a64, b64), dy.double())
    for ours, theirs in zip((y, *found), (y64, *expected), strict=True):
        assert_close(ours, theirs.cpu(), 2e-2)


@pytest.mark.gpu
def test_training_keeps_no_dense_weight():
    layer = make_layer(4096, 4096, 4, 128).cuda()
    lora_a, lora_b = (t.detach().cuda().requires_grad_() for t in adapter_for(layer, 8, torch.float32))
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x, delta(lora_a, lora_b)).sum().backward()  # scratch and tuned kernels are there from now on
    before = torch.cuda.memory_allocated()
    y = layer(x, delta(lora_a, lora_b))
    assert torch.cuda.memory_allocated() - before < 2 * y.nbytes  # y, P(x); the dense weight would be 32 MiB


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tokens", [1, 500])
def test_layers_run_where_their_tensors_are(tokens):
    """Triton launches on the current device; ``device_map="auto"`` puts layers on others."""
    layer = make_layer(1024, 512, 4, 32, offsets=True).to("cuda:1")
    x = torch.randn(tokens, 1024, device="cuda:1", dtype=torch.bfloat16)
    with torch.cuda.device(0):
        y = layer(x)
    assert_close(y.cpu(), x.cpu().double() @ reference_weight(layer.cpu()), 2e-2)
