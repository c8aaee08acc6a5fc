"""Layers and adapters for the kernel tests."""

import torch
from fabricate import quantise

from qalora_plugin.quant import reference
from qalora_plugin.quant.linear import QuantLinear


def make_layer(
    in_features, out_features, bits, group_size, fmt="gptq", act_order=False, offsets=False, bias=False, seed=0
):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    layer = QuantLinear(
        in_features, out_features, bits, group_size, fmt, bias=bias, offset_dtype=torch.float16 if offsets else None
    )
    for name, value in quantise(weight, bits, group_size, False, fmt, act_order, generator).items():
        setattr(layer, name, value)
    for name in ("offsets", "bias"):
        if getattr(layer, name) is not None:
            getattr(layer, name).normal_(0, 0.1, generator=generator)
    return layer.finalize()


def reference_weight(layer):
    return reference.dequantize(
        layer.qweight, layer.qzeros, layer.scales, layer.g_idx, layer.bits, layer.checkpoint_format, layer.offsets
    )


def adapter_for(layer, rank, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    lora_a = torch.randn(rank, layer.groups, generator=generator, dtype=torch.float64).to(dtype)
    lora_b = torch.randn(layer.out_features, rank, generator=generator, dtype=torch.float64).to(dtype) * 0.1
    return lora_a.requires_grad_(), lora_b.requires_grad_()
