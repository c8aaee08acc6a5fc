"""``y = x·(w + offsets)`` straight from the packed weight, with the adapter folded in: one GEMM, no dense weight kept.

    forward    w' = dequant(q, scales, zeros, offsets + α/R·(B·A)ᵀ)      y  = x·w'
    backward   w' again, from the packed tensors                         dx = dy·w'ᵀ
               dB = α/R · dyᵀ·(P(x)·Aᵀ)                                  dA = α/R · (dy·B)ᵀ·P(x)

Between the two only ``P(x)`` is saved, 1/g of ``x``. The weight multiplied here is, up to the rounding of the stored
offsets, the one that the merged checkpoint serves.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dequant import dequantize

if TYPE_CHECKING:
    from ..quant.linear import QuantLinear


def pool(x: Tensor, layer: "QuantLinear") -> Tensor:
    """``P(x)``: x summed over each quantisation group of ``layer``, ``[..., K] → [..., G]``."""
    if layer.act_order:
        x = x.index_select(-1, layer.group_order)
    return x.unflatten(-1, (layer.groups, layer.group_size)).sum(-1)


def linear(
    x: Tensor, layer: "QuantLinear", lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """``x·w + P(x)·offsets + scaling·P(x)·Aᵀ·Bᵀ + bias`` in the dtype of x (the autocast dtype under autocast).

    Args:
        x: ``[..., K]``. lora_a: ``[R, G]``, lora_b: ``[N, R]``, both or neither.

    Returns:
        ``[..., N]``.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = _PackedLinear.apply(x, lora_a, lora_b, scaling, layer)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def _effective_offsets(
    layer: "QuantLinear", lora_a: Tensor | None, lora_b: Tensor | None, scaling: float
) -> Tensor | None:
    """``offsets + scaling·(B·A)ᵀ`` [G, N], float32 or better."""
    if lora_a is None:
        return layer.offsets
    math_dtype = torch.promote_types(lora_a.dtype, torch.float32)
    adapter = scaling * (lora_a.to(math_dtype).t() @ lora_b.to(math_dtype).t())
    return adapter if layer.offsets is None else adapter + layer.offsets


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, layer: "QuantLinear"):
        ctx.layer, ctx.scaling = layer, scaling
        pooled = pool(x, layer) if lora_a is not None and any(ctx.needs_input_grad[1:3]) else None
        ctx.save_for_backward(pooled, lora_a, lora_b)
        with torch.autocast(x.device.type, enabled=False):
            return x @ dequantize(layer, x.dtype, _effective_offsets(layer, lora_a, lora_b, scaling))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        pooled, lora_a, lora_b = ctx.saved_tensors
        layer, scaling = ctx.layer, ctx.scaling
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ dequantize(layer, dy.dtype, _effective_offsets(layer, lora_a, lora_b, scaling)).t()
        if pooled is not None:
            dy, pooled = dy.flatten(0, -2), pooled.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                da = scaling * (dy @ lora_b.to(dy.dtype)).t().to(lora_a.dtype) @ pooled.to(lora_a.dtype)
            if ctx.needs_input_grad[2]:
                hidden = pooled.to(lora_a.dtype) @ lora_a.t()
                db = scaling * (dy.t() @ hidden.to(dy.dtype)).to(lora_b.dtype)
        return dx, da, db, None, None
