"""Quantized layers, adapters on them, and what the reference makes of them: for every test that needs one."""

import torch
from support.fabricate import quantize

from qalora_plugin.core import reference
from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.formats.qalora import QALora
from qalora_plugin.layers.linear import QuantLinear


def read_stored(stored: dict, bits: int, fmt: str = "gptq") -> GroupwiseWeight:
    """The weight of tensors as a checkpoint stores them, by the last parts of their names."""
    groups, n = stored["scales"].shape
    k = stored["qweight"].shape[0] * 32 // bits
    spec = GroupwiseSpec(
        "layer", k, n, bits, k // groups, has_g_idx="g_idx" in stored,
        offset_dtype="float16" if {"offsets", "offsets_a"} & stored.keys() else None,
        offset_rank=stored["offsets_a"].shape[1] if "offsets_a" in stored else 0,
        scales_delta_dtype="float16" if "scales_delta" in stored else None,
    )  # fmt: skip
    return QALora({"checkpoint_format": fmt}).read(spec, lambda name: stored[name.removeprefix("layer.")])


def make_layer(
    in_features, out_features, bits, group_size, fmt="gptq", act_order=False, offsets=False, bias=False, seed=0,
    negative_scales=False, std=1.0,
):  # fmt: skip
    """A random layer.

    Args:
        offsets: True, or their dtype.
        negative_scales: scales of both signs and zeros over the whole range, as asymmetric and AutoRound bases have.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) * std
    if negative_scales:
        weight += torch.randn(out_features, 1, generator=generator)
    stored = quantize(weight, bits, group_size, False, fmt, act_order, generator)
    if negative_scales:
        stored["scales"][:, ::3] *= -1
    if offsets:
        shifts = torch.empty(stored["scales"].shape).normal_(0, 0.1 * std, generator=generator)
        stored["offsets"] = shifts.to(torch.float16 if offsets is True else offsets)
    bias = torch.empty(out_features).normal_(0, 0.1, generator=generator).half() if bias else None
    quantized = read_stored(stored, bits, fmt)
    return QuantLinear(spec_of(quantized)).set_weight(quantized, bias)


def spec_of(weight: GroupwiseWeight) -> GroupwiseSpec:
    return GroupwiseSpec("layer", weight.in_features, weight.out_features, weight.bits, weight.group_size)


def reference_weight(layer):
    return reference.dequantize(layer.quantized)


def column_groups(layer):
    return reference.column_groups(layer.quantized)


def adapter_for(layer, rank, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lora_a = torch.randn(rank, layer.groups, generator=generator, dtype=torch.float64).to(dtype)
    lora_b = torch.randn(layer.out_features, rank, generator=generator, dtype=torch.float64).to(dtype) * 0.1
    return lora_a.requires_grad_(), lora_b.requires_grad_()


def scale_factors_for(layer, rank, dtype=torch.float32, seed=2):
    """D ``[G, R]`` and C ``[R, N]`` that move the scales by a tenth."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(layer.groups, rank, generator=generator, dtype=torch.float64).to(dtype)
    c = torch.randn(rank, layer.out_features, generator=generator, dtype=torch.float64).to(dtype) * 0.1
    return d.requires_grad_(), c.requires_grad_()


def delta(lora_a, lora_b, scaling=1.0):
    """The adapter as layers take it; None for none."""
    return None if lora_a is None else OffsetDelta(lora_a, lora_b, scaling)


def assert_close(found, expected, tolerance):
    """In the largest norm, relative to the largest expected value."""
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()
