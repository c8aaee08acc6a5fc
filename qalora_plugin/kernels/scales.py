"""The gradient of trained scales: what ``xᵀ·dy`` is in each group along the codes.

    dM[γ,n] = Σ_{k∈γ} scales[γ,n]·(q[k,n] − zeros[γ,n]) · (xᵀ·dy)[k,n]          M = D·C, scales' = scales ⊙ (1 + M)

``xᵀ·dy`` is the gradient of a dense weight. It is made a block of groups at a time and summed up at once.
"""

import torch
from torch import Tensor

from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels import cpu
from qalora_plugin.kernels.hardware import gemm_dtype
from qalora_plugin.kernels.unpacking import dequantized, product

BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights of a block: what a cache holds, and what keeps a GPU busy


def factor_gradient(x: Tensor, dy: Tensor, weight: GroupwiseWeight) -> Tensor:
    """``dM`` ``[G, N]`` of x ``[T, K]`` and dy ``[T, N]``; float32, or float64 as they are.

    Products run in dy's dtype, as any layer's do, where the device multiplies in it.
    """
    dtype = gemm_dtype(dy.dtype, dy.device)
    x, dy = x.to(dtype), dy.to(dtype)
    plain, total = weight._replace(offsets=None), torch.promote_types(dtype, torch.float32)
    if weight.g_idx is not None or weight.group_size % codes_per_period(weight.bits):
        return _by_index(x, dy, plain, total)
    gradient = dy.new_empty(weight.groups, weight.out_features, dtype=total)
    size = weight.group_size * weight.out_features
    step = max(1, BLOCK.get(dy.device.type, BLOCK["cuda"]) // size)
    in_cpp = cpu.why_not_fill(weight, dtype) is None
    for first in range(0, weight.groups, step):
        groups = slice(first, min(first + step, weight.groups))
        rows = slice(groups.start * weight.group_size, groups.stop * weight.group_size)
        along, part = product(x[:, rows].t(), dy), plain.narrow(k=rows)
        if in_cpp:
            cpu.factor_gradient(along, part, gradient[groups])
        else:
            with dequantized(part, dtype) as dense:
                along = along.to(total).mul_(dense)
                torch.sum(along.unflatten(0, (-1, weight.group_size)), 1, out=gradient[groups])
    return gradient


def _by_index(x: Tensor, dy: Tensor, weight: GroupwiseWeight, total: torch.dtype) -> Tensor:
    """Where a block of rows is no block of groups (act-order) or of words: the weight whole, columns of N in blocks."""
    group = weight.g_idx
    if group is None:
        group = torch.arange(weight.in_features, device=x.device) // weight.group_size
    gradient = dy.new_zeros(weight.groups, weight.out_features, dtype=total)
    step = max(1, BLOCK.get(dy.device.type, BLOCK["cuda"]) // weight.in_features)
    with dequantized(weight, dy.dtype) as dense:
        for first in range(0, weight.out_features, step):
            n = slice(first, first + step)
            along = product(x.t(), dy[:, n]).to(total).mul_(dense[:, n])
            gradient[:, n].index_add_(0, group, along)
    return gradient
