"""Layers for the compiled CPU kernels, and the weights that these make and should make."""

import os

import torch
from support import layers
from support.layers import delta

from qalora_plugin.core import reference
from qalora_plugin.kernels import cpu

COMPILER = os.environ.get("CXX", "c++")  # as torch looks for it; with one, a kernel that does not build must fail


def make_layer(in_features, out_features, bits, group_size, fmt="gptq", act_order=False, offsets=None, seed=0):
    """With scales of both signs and zeros over the whole range, as asymmetric and AutoRound bases have them."""
    return layers.make_layer(
        in_features, out_features, bits, group_size, fmt, act_order, offsets, seed=seed, negative_scales=True
    )


def adapter_for(layer, rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lora_a = torch.randn(rank, layer.groups, generator=generator) / rank**0.5
    return lora_a, torch.randn(layer.out_features, rank, generator=generator)


def filled(layer, lora_a, lora_b, dtype, scales=torch.float16, scaling=0.5):
    # Filled with NaN: an element that is not written shows.
    out = torch.full((layer.in_features, layer.out_features), float("nan"), dtype=dtype)
    weight = layer.quantized._replace(scales=layer.scales.to(scales))
    cpu.fill(weight, delta(lora_a, lora_b, scaling), out)
    return out


def expected_weight(layer, lora_a, lora_b, scales=torch.float16, scaling=0.5):
    offsets = None if layer.offsets is None else layer.offsets.double()
    if lora_a is not None:
        added = reference.adapter_offsets(lora_a, lora_b, scaling)
        offsets = added if offsets is None else offsets + added
    return reference.dequantize(layer.quantized._replace(scales=layer.scales.to(scales), offsets=offsets))
