"""The Triton kernel of trained scales against the reference in float64; without a GPU interpreted."""

from pathlib import Path

import pytest
import torch
from support.layers import adapter_for, assert_close, delta, make_layer, scale_factors_for
from support.nvidia_machine_code import run_uninterpreted
from test_grouped import CHOSEN, DEVICE, EXPERTS, TOLERANCE, random, stacked, tiles_of

from qalora_plugin.core import reference
from qalora_plugin.core.delta import ScaleDelta
from qalora_plugin.kernels import scales as in_torch
from qalora_plugin.kernels.triton import scales


def defined(weight, x, dy):
    """``Σ_{k∈γ} w·(xᵀ·dy)`` in float64, offsets left out."""
    dense = reference.dequantize(weight._replace(offsets=None))
    along = dense * (x.cpu().double().t() @ dy.cpu().double())
    return along.unflatten(0, (-1, weight.group_size)).sum(1)


def on_device(weight):
    return weight.of([None if t is None else t.to(DEVICE) for t in weight.tensors], weight.bits, weight.group_size)


@pytest.mark.parametrize(
    ("bits", "group_size", "k"),
    [
        (4, 32, 96),
        (4, 8, 72),
        (4, 24, 96),
        (4, 128, 384),
        (4, 96, 96),
        (2, 16, 80),
        (2, 64, 128),
        (3, 32, 96),
        (8, 4, 68),
    ],
)  # fmt: skip
def test_every_layout(bits, group_size, k):
    """Of 160 outputs and 70 tokens, which fill no tile; groups within one, of one, and of several."""
    weight = make_layer(k, 160, bits, group_size, offsets=True, negative_scales=True).quantized
    for dtype in TOLERANCE if (bits, group_size) == (4, 32) else [torch.float32]:
        x, dy = random(70, k, dtype=dtype), random(70, 160, dtype=dtype)
        found = scales.factor_gradient(x, dy, on_device(weight))
        assert found.dtype == torch.float32
        assert found.shape == (k // group_size, 160)
        assert_close(found.cpu(), defined(weight, x, dy), 2e-6)


def test_no_tokens():
    weight = on_device(make_layer(64, 32, 4, 32).quantized)
    assert not scales.factor_gradient(random(0, 64), random(0, 32), weight).any()


@pytest.mark.parametrize("group_size", [32, 96])
def test_of_every_expert(group_size):
    weight, layers = stacked(96, 160, group_size=group_size)
    slots = CHOSEN.flatten()
    x, dy = random(len(slots), 96), random(len(slots), 160)
    found = scales.factor_gradient(x, dy, weight, tiles_of(CHOSEN.flatten()[:, None]))
    assert found.shape == (EXPERTS, 96 // group_size, 160)
    for i, layer in enumerate(layers):
        assert_close(found[i].cpu(), defined(layer, x[slots == i], dy[slots == i]), 2e-6)
    assert not found[3].any()


@pytest.mark.parametrize("bits", [3, 4])
def test_what_a_gpu_runs_is_what_runs_elsewhere(monkeypatch, bits):
    """Where the kernel is for a tensor, it is chosen; where its groups hold no whole words, torch multiplies."""
    ran = []
    monkeypatch.setattr(in_torch, "triton_has_tensor_cores", lambda tensor: True)
    original = scales.factor_gradient
    monkeypatch.setattr(scales, "factor_gradient", lambda *arguments: ran.append(1) or original(*arguments))
    for group_size, act_order, count in ((32, False, 1), (32, True, 0), (12, False, 0)):
        weight = on_device(make_layer(96, 64, bits, group_size, act_order=act_order).quantized)
        x, dy = random(70, 96), random(70, 64)
        found = in_torch.factor_gradient(x, dy, weight)
        with monkeypatch.context() as patch:
            patch.setattr(in_torch, "triton_has_tensor_cores", lambda tensor: False)
            assert_close(found.cpu(), in_torch.factor_gradient(x, dy, weight).cpu().double(), 2e-6)
        assert len(ran) == count
        ran.clear()


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    """Neither the choice of tokens nor their product: each wait would cost a linear as much as launching it."""
    layer = make_layer(256, 128, 4, 32).to(DEVICE)
    x = random(512, 256, dtype=torch.bfloat16).requires_grad_()
    lora = delta(*(t.detach().to(DEVICE).requires_grad_() for t in adapter_for(layer, 4)))
    factors = ScaleDelta(*(t.detach().to(DEVICE).requires_grad_() for t in scale_factors_for(layer, 4)), 8)
    for mode in ("default", "error"):  # once to compile
        torch.cuda.set_sync_debug_mode(mode)
        try:
            layer(x, lora, factors).square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert factors.c.grad.any()


def test_the_kernel_compiles_for_nvidia_gpus():
    run_uninterpreted(Path(__file__).with_name("compile_scales_kernels.py"))
