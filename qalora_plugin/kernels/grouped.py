"""Stacked experts on CUDA: the linear of :mod:`.autograd`, each token by its expert's weight and adapter, at once.

    forward    y[s] = x[s]·w'_e              w'_e = dequant(q, scales, zeros, offsets + α/R·(B_e·A_e)ᵀ)
    backward   dx[s] = dy[s]·w'_eᵀ           dA_e, dB_e through P(x)ᵀ·dy over the slots of e

Only ``P(x)`` is kept between the two, and no dense weight is ever written: the kernels (:mod:`.triton.grouped`) unpack
in registers. The loop over experts that all else takes needs some six launches an expert, and waits for their counts.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels.hardware import autocast, runs_triton
from qalora_plugin.kernels.pooling import pool

if TYPE_CHECKING:
    from qalora_plugin.kernels.triton.grouped import Tiles  # Triton is not everywhere

# Multiplications of one expert from which on cuBLAS, which is faster than a kernel of ours, wins although it takes a
# launch an expert: an estimate for an H100 (some 10 µs of its tensor cores), not measured.
LONG = 2**32


def tiles_for(x: Tensor, chosen: Tensor, experts: int, weights: int) -> "Tiles | None":
    """How so many experts take x ``[T, K]`` together; None: one after the other is the way, or the faster one.

    Args:
        chosen: ``[T, k]``, the experts of each token. weights: K·N of an expert.
    """
    if not takes(x) or chosen.numel() // experts * weights >= LONG:
        return None
    from qalora_plugin.kernels.triton.grouped import Tiles

    return Tiles.of(chosen, experts)


def takes(x: Tensor) -> bool:
    """Whether the kernels are for x at all."""
    return runs_triton(x)


@torch.compiler.disable
def linear(x: Tensor, weight: GroupwiseWeight, tiles: "Tiles", delta: OffsetDelta | None = None) -> Tensor:
    """``[S, N]`` in the dtype of x (the autocast dtype under autocast), a row for each slot.

    Args:
        x: ``[T, K]``, or a row for each slot, ``[S, K]``.
        delta: of all experts, A ``[E, R, G]`` (or one for all, ``[R, G]``) and B ``[E, N, R]``.
    """
    return _GroupedLinear.apply(autocast(x), *(delta or (None, None, 1.0)), weight, tiles)


@torch.compiler.disable
def adapter(x: Tensor, weight: GroupwiseWeight, tiles: "Tiles", delta: OffsetDelta) -> Tensor:
    """What an adapter adds by itself, ``[S, N]``, where dropout keeps its x from being the base's."""
    x = autocast(x)
    lora_a, lora_b, scaling = delta
    pooled = pool(x, weight) if weight.group_order is None else _PoolByExpert.apply(x, weight, tiles)
    narrow = _Product.apply(pooled, _of_each(lora_a, len(lora_b)).mT, tiles)
    return _Product.apply(narrow, lora_b.mT, tiles) * scaling


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, weight: GroupwiseWeight,
        tiles: "Tiles",
    ) -> Tensor:  # fmt: skip
        from qalora_plugin.kernels.triton import grouped

        y = grouped.multiply(x, weight, _offsets(weight, lora_a, lora_b, scaling), tiles)
        pooled = None
        if any(ctx.needs_input_grad[1:3]):
            pooled = pool(x, weight) if weight.group_order is None else grouped.pool(x, weight, tiles)
        ctx.save_for_backward(pooled, lora_a, lora_b)
        ctx.scaling, ctx.weight, ctx.tiles, ctx.rows = scaling, weight, tiles, len(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from qalora_plugin.kernels.triton import grouped

        pooled, lora_a, lora_b = ctx.saved_tensors
        wants_dx, wants_a, wants_b = ctx.needs_input_grad[:3]
        dx = da = db = None
        if wants_dx:
            offsets = _offsets(ctx.weight, lora_a, lora_b, ctx.scaling)
            dx = _by_row(grouped.multiply_t(dy, ctx.weight, offsets, ctx.tiles), ctx.rows)
        if wants_a or wants_b:
            gradient = grouped.outer(pooled, dy, len(lora_b), ctx.tiles) * ctx.scaling
            if wants_a:
                da = lora_b.float().mT @ gradient.mT
                da = (da if lora_a.ndim == 3 else da.sum(0)).to(lora_a.dtype)
            if wants_b:
                db = (gradient.mT @ lora_a.float().mT).to(lora_b.dtype)
        return dx, da, db, None, None, None


class _Product(torch.autograd.Function):
    """Each slot's row of x times its expert's matrix, ``[E, I, N]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, m: Tensor, tiles: "Tiles") -> Tensor:
        from qalora_plugin.kernels.triton import grouped

        ctx.save_for_backward(x, m)
        ctx.tiles = tiles
        return grouped.product(x, m, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from qalora_plugin.kernels.triton import grouped

        x, m = ctx.saved_tensors
        wants_dx, wants_dm, _ = ctx.needs_input_grad
        dx = _by_row(grouped.product(dy, m.mT, ctx.tiles), len(x)) if wants_dx else None
        return dx, grouped.outer(x, dy, len(m), ctx.tiles).to(m.dtype) if wants_dm else None, None


class _PoolByExpert(torch.autograd.Function):
    """``P_e(x)`` in act-order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: GroupwiseWeight, tiles: "Tiles") -> Tensor:
        from qalora_plugin.kernels.triton import grouped

        ctx.weight, ctx.tiles, ctx.rows = weight, tiles, len(x)
        return grouped.pool(x, weight, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        owners = ctx.tiles.owners().long()
        return _by_row(gradient.gather(1, ctx.weight.g_idx[owners].long()), ctx.rows), None, None


def _offsets(weight: GroupwiseWeight, a: Tensor | None, b: Tensor | None, scaling: float) -> Tensor | None:
    """``[E, G, N]``, float32: the weight's, and what an adapter adds to them."""
    before = None if weight.offsets is None else weight.offsets.float()
    if a is None or b is None:
        return None if before is None else before.contiguous()
    a, b = _of_each(a, len(b)).float().mT, b.float().mT
    if before is None:
        return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scaling)
    return torch.baddbmm(before, a, b, alpha=scaling)


def _of_each(lora_a: Tensor, experts: int) -> Tensor:
    return lora_a if lora_a.ndim == 3 else lora_a.expand(experts, -1, -1)


def _by_row(by_slot: Tensor, rows: int) -> Tensor:
    """Gradients of slots added up for the row of x that they share."""
    return by_slot if rows == len(by_slot) else by_slot.unflatten(0, (rows, -1)).sum(1)
