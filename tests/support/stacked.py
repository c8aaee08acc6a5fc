"""Layers of stacked experts, and tokens for them."""

from dataclasses import replace

import torch
from support.layers import make_layer, spec_of

from qalora_plugin.layers.experts import QuantExpertLinear

EXPERTS, HIDDEN, INNER, RANK, TOKENS, SCALING = 5, 64, 96, 3, 11, 2.0


def make_linear(k, n, seed, bits=4, **kind):
    made = [make_layer(k, n, bits, 32, seed=seed + i, **kind) for i in range(EXPERTS)]
    weights = [one.quantized for one in made]
    dtype = "float16" if kind.get("bias") else None
    specs = [replace(spec_of(weight), bias_dtype=dtype) for weight in weights]
    layer = QuantExpertLinear(specs, act_order=kind.get("act_order", False))
    if kind.get("offsets"):
        layer.offsets = torch.empty(EXPERTS, *weights[0].offsets.shape, dtype=torch.float16)
    for i, weight in enumerate(weights):
        layer.put(i, weight, bias=made[i].bias)
    return layer, weights


def routing(k=2):
    generator = torch.Generator().manual_seed(1)
    chosen = torch.stack(
        [torch.randperm(EXPERTS - 1, generator=generator)[:k] for _ in range(TOKENS)]
    )  # the last: idle
    return chosen, torch.rand(TOKENS, k, generator=generator)
