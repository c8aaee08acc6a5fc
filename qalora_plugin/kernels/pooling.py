"""``P(x)``: x summed over each quantization group. Differentiable."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels.hardware import runs_triton


def pool(x: Tensor, weight: GroupwiseWeight) -> Tensor:
    """``[..., K] → [..., G]`` by the groups of ``weight``."""
    if weight.group_order is not None:
        x = x.index_select(-1, weight.group_order)
    if runs_triton(x) and x.numel():
        return _Pool.apply(x.contiguous(), weight.groups)
    return x.unflatten(-1, (weight.groups, weight.group_size)).sum(-1)


class _Pool(torch.autograd.Function):
    """The sum over groups in order, by a kernel of its own (Triton)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> Tensor:
        from qalora_plugin.kernels.triton import pooling  # Triton is not everywhere

        ctx.group_size = x.shape[-1] // groups
        return pooling.pool(x, groups, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.repeat_interleave(ctx.group_size, dim=-1), None
