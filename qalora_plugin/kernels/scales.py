"""Trained scales: the weight that they make, and their gradient, what ``xᵀ·dy`` is in each group along the codes.

    dM[γ,n] = Σ_{k∈γ} scales[γ,n]·(q[k,n] − zeros[γ,n]) · (xᵀ·dy)[k,n]          M = D·C, scales' = scales ⊙ (1 + M)

``xᵀ·dy`` is the gradient of a dense weight. On NVIDIA GPUs a kernel sums up each tile of it in registers
(:mod:`.triton.scales`), as C++ does on CPUs that multiply in bfloat16; elsewhere it is made a block of groups at a time
and summed up at once. Some tokens can stand for all: those that have a larger share in it are likelier to, and count
for less.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qalora_plugin.core.delta import OffsetDelta, ScaleDelta
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels import cpu
from qalora_plugin.kernels.hardware import gemm_dtype, triton_has_tensor_cores
from qalora_plugin.kernels.unpacking import dequantized, product

BLOCK = {"cpu": 1 << 22, "cuda": 1 << 24}  # weights of a block: what a cache holds, and what keeps a GPU busy


def in_steps(
    weight: GroupwiseWeight, delta: OffsetDelta | None, d: Tensor | None, c: Tensor | None
) -> tuple[GroupwiseWeight, OffsetDelta | None]:
    """The weight with trained scales and what they measure; as it is without."""
    if d is None or c is None:
        return weight, delta
    if d.dtype == torch.float32 and cpu.why_not_fill(weight, d.dtype) is None:
        return cpu.in_steps(weight, delta, d, c)
    changed = weight._replace(scales=ScaleDelta(d, c).materialize(weight.scales))
    if delta is None:
        return changed, None
    offsets = delta.materialize() * weight.scales
    return changed._replace(offsets=offsets if weight.offsets is None else offsets.add_(weight.offsets)), None


class Representatives(NamedTuple):
    """Tokens that stand for all of a batch.

    Attributes:
        x, dy: their rows, each divided by its norm. share: ``[]``, what ``xᵀ·dy`` is to be multiplied by.
        rows: int64, which rows of dy they are.
    """

    x: Tensor
    dy: Tensor
    share: Tensor
    rows: Tensor


def representatives(x: Tensor, dy: Tensor, count: int, place: Tensor) -> Representatives:
    """Tokens whose ``xᵀ·dy``, times a number, has ``Σ xᵀ·dy`` of all as its mean over ``place``.

    A token's share is |x|·|dy|, and the chance that it is taken is in proportion: so every one that is taken counts for
    the same, and their sum varies least (sampling in proportion to size, in a systematic order). Taken uniformly, few
    would be of those that matter: of prompts, and of what the model knows, dy is small or zero.

    Args:
        x: ``[T, K]``. dy: ``[T, N]``, or a multiple of T rows, of which as many belong to each row of x in turn.
        count: how many to take; one with a large share is taken more than once. place: ``[1]``, uniform in [0, 1),
            on the CPU.
    """
    if cpu.takes_representatives(x, dy):
        x, dy, whole, rows = cpu.representatives(x, dy, count, place.item())
        return Representatives(x, dy, x.new_tensor(whole, dtype=torch.float32), rows)
    total, each = torch.promote_types(dy.dtype, torch.float32), len(dy) // len(x)
    x_norm, dy_norm = _norms(x), _norms(dy)
    by_token = x_norm if each == 1 else x_norm.repeat_interleave(each)
    edges = _running_sum(by_token.to(total) * dy_norm)
    share = edges[-1] / count
    # A number, for a copy to a GPU would wait for it.
    points = torch.arange(count, dtype=torch.float64, device=x.device).add_(place.item()).mul_(share)
    rows = torch.searchsorted(edges, points, right=True).clamp_(max=len(dy) - 1)
    smallest = torch.finfo(x_norm.dtype).tiny
    x, dy = (
        t[taken].div_(norm[taken, None].clamp_min(smallest))
        for t, norm, taken in ((x, x_norm, rows if each == 1 else rows // each), (dy, dy_norm, rows))
    )
    return Representatives(x, dy, share.to(total), rows)


def _running_sum(shares: Tensor) -> Tensor:
    """float64. Where torch is to give the same every time, of whole numbers: of others CUDA's sums are in any order,
    and refused then."""
    if not (shares.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return shares.cumsum(0, dtype=torch.float64)
    return _running_sum_of_integers(shares)


def _running_sum_of_integers(shares: Tensor) -> Tensor:
    """In parts of the whole that float64 counts exactly."""
    shares = shares.double()
    step = shares.sum().clamp_min(torch.finfo(torch.float64).tiny * 2.0**52) * 2.0**-52
    return (shares / step).round().to(torch.int64).cumsum(0) * step


def _norms(t: Tensor) -> Tensor:
    """Of rows, in their own dtype: what they are divided by need not be exact, and a CPU is four times as fast so in
    bfloat16. (In float16 a norm could overflow.)"""
    return torch.linalg.vector_norm(t, dim=1, dtype=torch.float32 if t.dtype == torch.float16 else None)


def factor_gradient(x: Tensor, dy: Tensor, weight: GroupwiseWeight) -> Tensor:
    """``dM`` ``[G, N]`` of x ``[T, K]`` and dy ``[T, N]``; float32, or float64 as they are.

    Products run in dy's dtype, as any layer's do, where the device multiplies in it.
    """
    dtype = gemm_dtype(dy.dtype, dy.device)
    x, dy = x.to(dtype), dy.to(dtype)
    plain, total = weight._replace(offsets=None), torch.promote_types(dtype, torch.float32)
    if weight.g_idx is not None or weight.group_size % codes_per_period(weight.bits):
        return _by_index(x, dy, plain, total)
    if triton_has_tensor_cores(dy):
        from qalora_plugin.kernels.triton import scales  # Triton is not everywhere

        return scales.factor_gradient(x, dy, plain)
    if dtype == torch.bfloat16 and cpu.why_not_multiply(weight, dtype) is None:
        return cpu.factor_gradient_of(x, dy, plain)
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
