"""Trained scales, forward and backward, against ``core/reference.py``."""

import pytest
import torch
from hypothesis import given, settings
from support.layers import adapter_for, assert_close, column_groups, delta, make_layer, scale_factors_for
from test_autograd import TOLERANCE, layers
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from qalora_plugin.core import reference
from qalora_plugin.core.delta import ScaleDelta
from qalora_plugin.kernels import cpu, scales


def compare(layer, x, tolerance, rank=4, factors=torch.float32):
    """One step of ``layer`` with offsets and scales trained, against float64."""
    lora_a, lora_b = adapter_for(layer, rank, factors)
    d, c = scale_factors_for(layer, rank, factors)
    y = layer(x, delta(lora_a, lora_b, 0.5), ScaleDelta(d, c))
    assert y.dtype == x.dtype
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, lora_a, lora_b, d, c), dy)

    x64, a64, b64, d64, c64 = (t.detach().double().requires_grad_() for t in (x, lora_a, lora_b, d, c))
    weight = reference.scaled_weight(layer.quantized, d64, c64)
    offsets = reference.adapter_offsets(a64, b64, 0.5, layer.quantized.scales)
    y64 = x64 @ (weight + offsets[column_groups(layer)])
    y64 = y64 if layer.bias is None else y64 + layer.bias.double()
    expected = torch.autograd.grad(y64, (x64, a64, b64, d64, c64), dy.double())
    for pair in zip((y, *found), (y64, *expected), strict=True):
        assert_close(*pair, tolerance)


@given(layers)
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_forward_and_backward(dtype, shape):
    bits, group_size, fmt, act_order, offsets, in_features, out_features = shape
    layer = make_layer(in_features, out_features, bits, group_size, fmt, act_order, offsets, bias=True)
    x = torch.randn(2, 5, in_features, dtype=dtype, requires_grad=True)
    compare(layer, x, TOLERANCE[dtype], factors=torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compiled_kernels_and_several_blocks(monkeypatch, bits, dtype):
    """Layers that the C++ kernels take, and groups that make up more than one block."""
    monkeypatch.setitem(scales.BLOCK, "cpu", 3 * 64 * 544)
    layer = make_layer(512, 544, bits, 64, offsets=True, negative_scales=True)
    assert cpu.why_not_fill(layer.quantized, dtype) is None or bits == 3
    compare(layer, torch.randn(70, 512).to(dtype).requires_grad_(), TOLERANCE[dtype])


def test_gradcheck():
    layer = make_layer(64, 32, 4, 32, act_order=True)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    d, c = scale_factors_for(layer, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda x, d, c: layer(x, None, ScaleDelta(d, c)), (x, d, c))


def test_saves_the_input_beside_the_pooled_one():
    layer, x = make_layer(256, 64, 4, 32), torch.randn(10, 256, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x, delta(*adapter_for(layer, 4)), ScaleDelta(*scale_factors_for(layer, 4)))
    assert sorted(tuple(t.shape) for t in saved) == sorted([(10, 256), (10, 8), (4, 8), (64, 4), (8, 4), (4, 64)])
    assert any(t.data_ptr() == x.data_ptr() for t in saved)  # x itself: what reads it beside this layer shares it


def of_tokens(tokens, dtype=torch.float32):
    """x and dy of tokens that matter unequally: some not at all, one more than a sample's equal part."""
    generator = torch.Generator().manual_seed(tokens)
    x, dy = torch.randn(tokens, 64, generator=generator), torch.randn(tokens, 32, generator=generator)
    dy *= torch.rand(tokens, 1, generator=generator) ** 4
    dy[::3] = 0
    dy[-1] *= 40
    return x.to(dtype), dy.to(dtype)


@pytest.mark.parametrize("tokens", [2, 13, 40])
def test_representatives_stand_for_all_tokens(tokens):
    """Their mean over every place is the whole."""
    x, dy = of_tokens(tokens)
    count, places = max(1, tokens // 4), 2000
    total = torch.zeros(64, 32, dtype=torch.float64)
    for i in range(places):
        some, their, share, _ = scales.representatives(x, dy, count, torch.tensor([(i + 0.5) / places]))
        assert len(some) == len(their) == count
        total += (some.double().t() @ their.double()) * share.double()
    wanted = x.double().t() @ dy.double()
    assert_close(total / places, wanted, 2e-3)


def test_representatives_vary_less_than_tokens_taken_alike():
    x, dy = of_tokens(400)
    wanted, spread = x.t() @ dy, {"by share": 0.0, "alike": 0.0}
    for seed in range(20):
        torch.manual_seed(seed)
        some, their, share, _ = scales.representatives(x, dy, 100, torch.rand(1))
        spread["by share"] += float((some.t() @ their * share - wanted).square().sum())
        rows = torch.randperm(400)[:100]
        spread["alike"] += float((4 * x[rows].t() @ dy[rows] - wanted).square().sum())
    assert spread["by share"] < spread["alike"] / 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_representatives_in_every_dtype(dtype):
    x, dy = of_tokens(16, dtype)
    some, their, share, _ = scales.representatives(x, dy, 16, torch.tensor([0.5]))
    assert some.dtype == their.dtype == dtype
    assert all(t.isfinite().all() for t in (some, their, share))
    nothing = scales.representatives(x, dy * 0, 4, torch.tensor([0.5]))
    assert not nothing[1].any()
    assert nothing[2] == 0
    huge = torch.full_like(dy, torch.finfo(torch.float16).max)
    assert all(t.isfinite().all() for t in scales.representatives(x, huge, 4, torch.tensor([0.0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_representatives_in_cpp_are_those_in_torch(monkeypatch, dtype):
    """Of a layer large enough for the compiled kernels. In bfloat16 torch rounds norms, which can move an edge."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(90, width, generator=generator).to(dtype) for width in (512, 513))
    dy[::3] = 0
    dy[7] *= 30
    assert cpu.takes_representatives(x, dy)
    for place in (0.0, 0.3, 0.99):
        found = scales.representatives(x, dy, 20, torch.tensor([place]))
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "takes_representatives", lambda x, dy: False)
            wanted = scales.representatives(x, dy, 20, torch.tensor([place]))
        assert found.x.dtype == found.dy.dtype == dtype
        torch.testing.assert_close(found.share, wanted.share, rtol=1e-5 if dtype == torch.float32 else 3e-3, atol=0)
        assert (found.rows == wanted.rows).float().mean() > (0.99 if dtype == torch.float32 else 0.8)
        for rows, whole in ((found.x, x), (found.dy, dy)):
            exact = torch.nn.functional.normalize(whole[found.rows].double(), dim=1)
            assert_close(rows, exact, 1e-6 if dtype == torch.float32 else 4e-3)
    nothing = scales.representatives(x, dy * 0, 4, torch.tensor([0.5]))
    assert nothing.share == 0
    assert all(t.isfinite().all() for t in nothing[:2])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [16, 128, 640])
def test_a_tile_of_the_gradient_stays_in_cache(bits, group_size):
    """bfloat16 in C++: an odd number of tokens, columns that fill no panel, groups longer than a tile."""
    weight = make_layer(640, 432, bits, group_size, offsets=True, negative_scales=True).quantized
    if cpu.why_not_multiply(weight, torch.bfloat16):
        pytest.skip("this CPU multiplies otherwise")
    x, dy = torch.randn(37, 640).bfloat16(), torch.randn(37, 432).bfloat16()
    found = scales.factor_gradient(x, dy, weight)
    along = reference.dequantize(weight._replace(offsets=None)) * (x.double().t() @ dy.double())
    assert_close(found, along.unflatten(0, (-1, group_size)).sum(1), 1e-5)
    assert not scales.factor_gradient(x[:0], dy[:0], weight).any()


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_offsets", [False, True])
@pytest.mark.parametrize("with_delta", [False, True])
def test_trained_scales_in_cpp(scale_dtype, with_offsets, with_delta):
    layer = make_layer(512, 544, 4, 32, offsets=with_offsets)
    weight = layer.quantized._replace(scales=layer.scales.to(scale_dtype))
    assert cpu.why_not_fill(weight, torch.float32) is None
    lora = delta(*(t.detach() for t in adapter_for(layer, 4)), 0.5) if with_delta else None
    d, c = (t.detach() for t in scale_factors_for(layer, 4))
    found, left = scales.in_steps(weight, lora, d, c)
    wanted, _ = scales.in_steps(weight._replace(scales=weight.scales.double()), lora, d.double(), c.double())
    assert left is None
    assert_close(found.scales, wanted.scales, 1e-6)
    assert (found.offsets is None) == (not with_offsets and not with_delta)
    if found.offsets is not None:
        assert_close(found.offsets, wanted.offsets.double(), 1e-6)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_nobodys_matter(default):
    """C++ writes float32, whatever torch makes by default; and a draw is one."""
    layer = make_layer(512, 544, 4, 32, offsets=True)
    lora, (d, c) = delta(*adapter_for(layer, 4)), scale_factors_for(layer, 4)
    x = torch.randn(40, 512, requires_grad=True)

    def step():
        torch.manual_seed(0)
        y = layer(x, lora, ScaleDelta(d, c, 4))
        return y, *torch.autograd.grad(y, (x, d, c, *lora[:2]), torch.ones_like(y))

    wanted = step()
    torch.set_default_dtype(default)
    try:
        found = step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("tokens", [40, 3])
def test_one_token_in_four_for_d_and_c_alone(tokens):
    """dx, dA and dB are those of all tokens; D and C get what the same draw gives again."""
    layer, x = make_layer(256, 64, 4, 32), torch.randn(tokens, 256, requires_grad=True)
    lora, (d, c) = delta(*adapter_for(layer, 4)), scale_factors_for(layer, 4)
    wanted = torch.autograd.grad(layer(x, lora, ScaleDelta(d, c)).square().sum(), (d, c, x, *lora[:2]))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(torch.autograd.grad(layer(x, lora, ScaleDelta(d, c, 4)).square().sum(), (d, c, x, *lora[:2])))
        for one, all_tokens in zip(found[-1][2:], wanted[2:], strict=True):
            assert torch.equal(one, all_tokens)
    for first, same, other, all_tokens in zip(*(one[:2] for one in found), wanted[:2], strict=True):
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
        assert torch.nn.functional.cosine_similarity(first.flatten(), all_tokens.flatten(), dim=0) > 0.3


def test_frozen_scales_save_no_input():
    layer, x = make_layer(256, 64, 4, 32), torch.randn(10, 256, requires_grad=True)
    d, c = (t.detach() for t in scale_factors_for(layer, 4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        layer(x, delta(*adapter_for(layer, 4)), ScaleDelta(d, c)).sum().backward()
    assert (10, 256) not in saved


def test_checkpointing_and_autocast():
    layer = make_layer(64, 32, 4, 32)
    lora, factors = delta(*adapter_for(layer, 2)), ScaleDelta(*scale_factors_for(layer, 2))
    x, grads = torch.randn(3, 64), []
    for run in (layer, lambda *args: torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(x, lora, factors)
        assert y.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(y.float().square().sum(), (*lora[:2], *factors[:2])))
    for one, other in zip(*grads, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_a_running_sum_of_whole_numbers():
    """What CUDA sums in the same order every time."""
    shares = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    shares[100:2000] = 0
    found = scales._running_sum_of_integers(shares)
    torch.testing.assert_close(
        found, shares.cumsum(0, dtype=torch.float64), rtol=1e-12, atol=1e-12 * shares.sum().item()
    )
    assert (found.diff() >= 0).all()
    assert not scales._running_sum_of_integers(torch.zeros(3)).any()


@pytest.mark.parametrize("act_order", [False, True])
def test_checkpointing_that_holds_products(act_order):
    """Axolotl's ``selective_checkpointing``: what it holds must stay as it was."""
    layer, x = make_layer(128, 64, 4, 32, act_order=act_order), torch.randn(5, 128, requires_grad=True)
    factors = (*adapter_for(layer, 2), *scale_factors_for(layer, 2))
    saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def run(x, a, b, d, c):
        return layer(x, delta(a, b), ScaleDelta(d, c))

    y = checkpoint(
        run, x, *factors, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(saved)
    )
    found = torch.autograd.grad(y.sum(), (x, *factors))
    for ours, wanted in zip(found, torch.autograd.grad(run(x, *factors).sum(), (x, *factors)), strict=True):
        assert torch.equal(ours, wanted)
