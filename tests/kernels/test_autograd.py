"""The packed linear, forward and backward, against ``quant/reference.py``."""

from threading import Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layers import adapter_for, assert_close, column_groups, delta, make_layer, reference_weight
from torch.utils._python_dispatch import TorchDispatchMode

from qalora_plugin.core import reference
from qalora_plugin.kernels import hardware, workspace
from qalora_plugin.kernels.pooling import pool
from qalora_plugin.kernels.unpacking import dequantized

# Relative to the largest value of the reference. bf16 rounds the weight and every output once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


layers = st.tuples(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([32, 64, 128, -1]),
    st.sampled_from(["gptq", "gptq_v2"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([128, 256]),
    st.sampled_from([32, 96]),
)


@given(layers)
@settings(max_examples=60, deadline=None)
def test_dequantise_is_the_definition(shape):
    bits, group_size, fmt, act_order, offsets, in_features, out_features = shape
    layer = make_layer(in_features, out_features, bits, group_size, fmt, act_order, offsets)
    expected = reference_weight(layer)
    assert torch.equal(layer.dense_weight(torch.float64), expected)
    assert_close(layer.dense_weight(torch.float32), expected, TOLERANCE[torch.float32])


@given(layers, st.sampled_from(list(TOLERANCE)), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_forward_and_backward(shape, dtype, tokens):
    bits, group_size, fmt, act_order, offsets, in_features, out_features = shape
    layer = make_layer(in_features, out_features, bits, group_size, fmt, act_order, offsets, bias=True)
    x = torch.randn(2, tokens, in_features, dtype=dtype, requires_grad=True)
    lora_a, lora_b = adapter_for(layer, 4, torch.float64 if dtype == torch.float64 else torch.float32)
    y = layer(x, delta(lora_a, lora_b, 0.5))
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, lora_a, lora_b), dy)

    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, lora_a, lora_b))
    weight, bias = reference_weight(layer), layer.bias.double()
    y64 = reference.adapter_linear(x64, weight, column_groups(layer), a64, b64, 0.5, bias)
    expected = torch.autograd.grad(y64, (x64, a64, b64), dy.double())
    for pair in zip((y, *found), (y64, *expected), strict=True):
        assert_close(*pair, TOLERANCE[dtype])


def test_gradcheck():
    layer = make_layer(64, 32, 4, 32, act_order=True)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    lora_a, lora_b = adapter_for(layer, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda x, a, b: layer(x, delta(a, b, 0.7)), (x, lora_a, lora_b))


def test_saves_only_the_pooled_input():
    """Between forward and backward: P(x), A and B. No dense weight, no x."""
    layer = make_layer(256, 64, 4, 32)
    x = torch.randn(10, 256, requires_grad=True)
    lora_a, lora_b = adapter_for(layer, 4, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        layer(x, delta(lora_a, lora_b))
    assert sorted(saved) == sorted([(10, 8), (4, 8), (64, 4)])


def test_one_scratch_for_all_layers():
    one, two = make_layer(128, 64, 4, 32), make_layer(64, 32, 4, 32, seed=3)
    with dequantized(one.quantized, torch.float32) as first:
        address = first.data_ptr()
    with dequantized(two.quantized, torch.float32) as second:
        assert second.data_ptr() == address


@pytest.mark.parametrize("act_order", [False, True])
def test_threads_do_not_overwrite_each_others_weights(act_order):
    """A threaded server calls layers of one model at the same time; the second fills the scratch of the first."""
    layers = [make_layer(512, 512, 4, 32, act_order=act_order, seed=seed) for seed in range(2)]
    x = torch.randn(64, 512)
    expected = [layer(x) for layer in layers]
    wrong = []

    def call(layer, y):
        for _ in range(30):
            if not torch.allclose(layer(x), y, rtol=1e-3, atol=1e-3 * y.abs().max()):
                wrong.append(layer)

    threads = [Thread(target=call, args=pair) for pair in zip(layers, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_scratch_born_in_inference_mode_serves_training():
    workspace._scratch.clear()
    workspace._views.clear()
    layer, x = make_layer(64, 32, 4, 32), torch.randn(3, 64, requires_grad=True)
    with torch.inference_mode():
        layer(x)
    lora_a, lora_b = adapter_for(layer, 2, torch.float32)
    layer(x, delta(lora_a, lora_b)).sum().backward()
    assert x.grad is not None


def test_autocast_decides_the_dtype():
    layer = make_layer(64, 32, 4, 32)
    lora_a, lora_b = adapter_for(layer, 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(3, 64, requires_grad=True), delta(lora_a, lora_b))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert lora_a.grad.dtype == torch.float32


def test_non_contiguous_and_empty_inputs():
    layer = make_layer(64, 32, 4, 32)
    weight = reference_weight(layer).float()
    x = torch.randn(64, 6).t()
    torch.testing.assert_close(layer(x), x @ weight)
    assert layer(torch.randn(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("act_order", [False, True])
def test_pool_is_the_sum_over_groups(act_order):
    layer = make_layer(128, 32, 4, 32, act_order=act_order)
    x = torch.randn(2, 3, 128, dtype=torch.float64)
    torch.testing.assert_close(pool(x, layer.quantized), reference.pool(x, column_groups(layer), layer.groups))


class Products(TorchDispatchMode):
    """Notes the dtype of every matrix product inside."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.dtypes += [tensor.dtype for tensor in args[-2:]]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("rank", [1, 4])  # the adapter's gradients factored, and through dE
def test_where_a_cpu_only_emulates_the_dtype_float32_multiplies(monkeypatch, rank, dtype, tolerance):
    monkeypatch.setattr(hardware, "emulates", lambda dtype: dtype.itemsize == 2)
    products = Products()
    layer = make_layer(256, 96, 4, 32)
    x = torch.randn(2, 5, 256).to(dtype).requires_grad_()
    lora_a, lora_b = adapter_for(layer, rank, torch.float32)
    with products:
        y = layer(x, delta(lora_a, lora_b, 0.5))
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, (x, lora_a, lora_b), dy)
    assert len(products.dtypes) >= 4
    assert set(products.dtypes) == {torch.float32}
    assert [t.dtype for t in (y, *found)] == [dtype, dtype, torch.float32, torch.float32]

    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, lora_a, lora_b))
    y64 = reference.adapter_linear(x64, reference_weight(layer), column_groups(layer), a64, b64, 0.5)
    expected = torch.autograd.grad(y64, (x64, a64, b64), dy.double())
    for one, other in zip((y, *found), (y64, *expected), strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()
