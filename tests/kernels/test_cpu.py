"""The compiled CPU kernel against ``core/reference.py``: every variant, and its limits."""

import itertools
import shutil

import pytest
import torch
from support.cpu_layers import COMPILER, adapter_for, expected_weight, filled, make_layer
from support.layers import assert_close, column_groups, delta

from qalora_plugin.core import reference
from qalora_plugin.core.packing import pack_rows
from qalora_plugin.kernels import cpu

RANKS = (1, 16, 70)
# Relative to the largest value of the float64 reference. float32 sums at most 70 products; bfloat16 is the float32
# result rounded once, which is checked exactly below, so that its half unit is all there is to allow.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8 + 2e-6}

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("out_features", [32, 1000, 1024, 2816])  # below, not a multiple of, and at the strip
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fill_is_the_definition(bits, group_size, out_features):
    out_features += -out_features % (32 // bits)  # 1000 columns do not pack at 2 bits: 1008
    variants = itertools.product(
        ("gptq", "gptq_v2"), (None, torch.float16, torch.float32), (torch.float16, torch.float32, torch.bfloat16)
    )
    for i, (fmt, offsets, scales) in enumerate(variants):
        layer = make_layer(384, out_features, bits, group_size, fmt, offsets=offsets, seed=i)  # 3, 6 or 12 groups, or 1
        for rank in (None, RANKS[i % len(RANKS)]):
            lora_a, lora_b = (None, None) if rank is None else adapter_for(layer, rank)
            expected = expected_weight(layer, lora_a, lora_b, scales)
            full = filled(layer, lora_a, lora_b, torch.float32, scales)
            half = filled(layer, lora_a, lora_b, torch.bfloat16, scales)
            assert_close(full, expected, TOLERANCE[torch.float32])
            assert_close(half, expected, TOLERANCE[torch.bfloat16])
            assert torch.equal(half, full.bfloat16())  # to nearest even


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adapter_of_any_rank_and_dtype(rank, adapter_dtype):
    layer = make_layer(256, 96, 4, 32, offsets=torch.float16)
    lora_a, lora_b = (t.to(adapter_dtype) for t in adapter_for(layer, rank))
    strided = lora_a.t().contiguous().t(), lora_b.t().contiguous().t()  # not contiguous
    expected = expected_weight(layer, lora_a, lora_b, scaling=2.0)
    for a, b in ((lora_a, lora_b), strided):
        assert_close(filled(layer, a, b, torch.float32, scaling=2.0), expected, TOLERANCE[torch.float32])


def test_extreme_codes_and_zeros():
    """Every code with every zero, all words of ones among them; v1 zeros of 0 borrow from their neighbour."""
    for bits, fmt in itertools.product((2, 4, 8), ("gptq", "gptq_v2")):
        layer = make_layer(256, 256, bits, 256, fmt)
        top = 2**bits
        codes, zeros = torch.arange(256) % top, torch.arange(256) % top
        layer.qweight = pack_rows(codes[:, None].expand(256, 256).contiguous(), bits)
        layer.zeros = zeros[None].to(torch.uint8)
        layer.scales.fill_(1)
        difference = (codes[:, None] - zeros[None]).float()
        assert torch.equal(filled(layer, None, None, torch.float32), difference)


def test_a_diverged_adapter_is_not_hidden():
    """NaN and infinity of an adapter reach the weight in bfloat16, too, whose rounding is done on integers."""
    layer = make_layer(128, 32, 4, 32)
    lora_a, lora_b = adapter_for(layer, 2)
    lora_a[:, 1], lora_a[:, 2] = float("nan"), float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        groups = filled(layer, lora_a, lora_b.abs(), dtype).view(4, 32, 32)
        assert groups[1].isnan().all()
        assert groups[2].isposinf().all()
        assert groups[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype):
    layer = make_layer(1024, 2816, 4, 64, offsets=torch.float16)
    lora_a, lora_b = adapter_for(layer, 16)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(filled(layer, lora_a, lora_b, dtype))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_takes_what_it_can_and_leaves_the_rest():
    def takes(in_features, out_features, bits, group_size, dtype=torch.bfloat16, **options):
        return (
            cpu.why_not_fill(make_layer(in_features, out_features, bits, group_size, **options).quantized, dtype)
            is None
        )

    assert all(takes(512, 512, bits, group) for bits in (2, 4, 8) for group in (32, 128, -1))
    assert takes(512, 512, 4, 32, torch.float32)
    assert not takes(512, 512, 4, 32, torch.float64)
    assert not takes(512, 512, 4, 32, torch.float16)
    assert not takes(512, 512, 3, 32)
    assert not takes(512, 512, 4, 32, act_order=True)
    assert not takes(512, 480, 4, 32)  # fewer than 2^18 weights
    assert not takes(528, 512, 2, 8)  # a word of sixteen codes spans two groups
    meta = make_layer(512, 512, 4, 32).to("meta").quantized
    assert cpu.why_not_fill(meta, torch.float32) == "it is on meta"


@pytest.mark.parametrize("offsets", [None, torch.float16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_large_layer_forward_and_backward(dtype, tolerance, offsets):
    """Through the module, as a model runs it; bfloat16 inputs are the same in the reference."""
    torch.manual_seed(0)
    layer = make_layer(512, 1024, 4, 32, offsets=offsets)
    assert cpu.why_not_fill(layer.quantized, dtype) is None
    x = torch.randn(2, 24, 512, dtype=dtype, requires_grad=True)
    lora_a, lora_b = (t.requires_grad_() for t in adapter_for(layer, 16))
    y = layer(x, delta(lora_a, lora_b, 0.5))
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, lora_a, lora_b), dy)

    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, lora_a, lora_b))
    y64 = reference.adapter_linear(x64, expected_weight(layer, None, None), column_groups(layer), a64, b64, 0.5)
    expected = torch.autograd.grad(y64, (x64, a64, b64), dy.double())
    for pair in zip((y, *found), (y64, *expected), strict=True):
        assert_close(*pair, tolerance)
