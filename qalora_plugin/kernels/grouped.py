"""Stacked experts on CUDA: the linear of :mod:`.autograd`, each token by its expert's weight and adapter, at once.

    forward    y[s] = x[s]·w'_e              w'_e = dequant(q, scales, zeros, offsets + α/R·(B_e·A_e)ᵀ)
    backward   dx[s] = dy[s]·w'_eᵀ           dA_e, dB_e through P(x)ᵀ·dy over the slots of e

Scales train as those of a linear do. Only ``P(x)`` is kept between the two (with trained scales also x), and no dense
weight is ever written: the kernels (:mod:`.triton.grouped`) unpack in registers. The loop over experts that all else
takes needs some six launches an expert, and waits for their counts.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qalora_plugin.core.delta import OffsetDelta, ScaleDelta
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels.hardware import autocast, runs_triton
from qalora_plugin.kernels.pooling import pool
from qalora_plugin.kernels.scales import representatives

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
def linear(
    x: Tensor,
    weight: GroupwiseWeight,
    tiles: "Tiles",
    delta: OffsetDelta | None = None,
    scale_delta: ScaleDelta | None = None,
) -> Tensor:
    """``[S, N]`` in the dtype of x (the autocast dtype under autocast), a row for each slot.

    Args:
        x: ``[T, K]``, or a row for each slot, ``[S, K]``.
        delta: of all experts, A ``[E, R, G]`` (or one for all, ``[R, G]``) and B ``[E, N, R]``; in units of ``w``, or
            of its scales, as they were, if there is a ``scale_delta``.
        scale_delta: likewise, D ``[E, G, R]`` and C ``[E, R, N]``; of groups that are columns in order, of whole words.
    """
    factors = (*(delta or (None, None, 1.0)), *(scale_delta or (None, None, 1)))
    return _GroupedLinear.apply(autocast(x), *factors, weight, tiles)


@torch.compiler.disable
def adapter(x: Tensor, weight: GroupwiseWeight, tiles: "Tiles", delta: OffsetDelta, in_steps: bool = False) -> Tensor:
    """What an adapter adds by itself, ``[S, N]``, where dropout keeps its x from being the base's.

    Args:
        in_steps: it is in units of the scales.
    """
    x = autocast(x)
    lora_a, lora_b, scaling = delta
    pooled = pool(x, weight) if weight.group_order is None else _PoolByExpert.apply(x, weight, tiles)
    a = _of_each(lora_a, len(lora_b)).mT
    if in_steps:
        with torch.autocast(x.device.type, enabled=False):
            offsets = (a.float() @ lora_b.float().mT) * weight.scales
        return _Product.apply(pooled, offsets, tiles) * scaling
    return _Product.apply(_Product.apply(pooled, a, tiles), lora_b.mT, tiles) * scaling


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, d: Tensor | None,
        c: Tensor | None, every: int, weight: GroupwiseWeight, tiles: "Tiles",
    ) -> Tensor:  # fmt: skip
        from qalora_plugin.kernels.triton import grouped

        y = grouped.multiply(x, *_changed(weight, lora_a, lora_b, scaling, d, c), tiles)
        pooled = None
        if any(ctx.needs_input_grad[1:3]):
            pooled = pool(x, weight) if weight.group_order is None else grouped.pool(x, weight, tiles)
        wants_scales = any(ctx.needs_input_grad[4:6])
        place = torch.rand(1, dtype=torch.float32, device="cpu") if every > 1 else None  # as for a linear
        ctx.save_for_backward(pooled, place, x if wants_scales else None, lora_a, lora_b, d, c)
        ctx.scaling, ctx.every, ctx.weight, ctx.tiles, ctx.rows = scaling, every, weight, tiles, len(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from qalora_plugin.kernels.triton import grouped

        pooled, place, x, lora_a, lora_b, d, c = ctx.saved_tensors
        wants_dx, wants_a, wants_b = ctx.needs_input_grad[:3]
        dx = da = db = dd = dc = None
        with torch.autocast(dy.device.type, enabled=False):
            if wants_dx:
                changed = _changed(ctx.weight, lora_a, lora_b, ctx.scaling, d, c)
                dx = _by_row(grouped.multiply_t(dy, *changed, ctx.tiles), ctx.rows)
            if wants_a or wants_b:
                gradient = grouped.outer(pooled, dy, len(lora_b), ctx.tiles) * ctx.scaling
                gradient = gradient if d is None else gradient * ctx.weight.scales
                if wants_a:
                    da = lora_b.float().mT @ gradient.mT
                    da = (da if lora_a.ndim == 3 else da.sum(0)).to(lora_a.dtype)
                if wants_b:
                    db = (gradient.mT @ lora_a.float().mT).to(lora_b.dtype)
            if x is not None:
                dd, dc = ScaleDelta(d, c).gradients(_of_scales(x, dy, ctx.weight, ctx.tiles, place, ctx.every))
                dd, dc = dd.to(d.dtype), dc.to(c.dtype)
        return dx, da, db, None, dd, dc, None, None, None


def _of_scales(
    x: Tensor, dy: Tensor, weight: GroupwiseWeight, tiles: "Tiles", place: Tensor | None, every: int
) -> Tensor:
    """``dM`` ``[E, G, N]`` of x ``[T or S, K]`` and dy ``[S, N]``: of one slot in ``every``, wherever ``place`` is
    drawn; slots of all experts together, as they matter."""
    from qalora_plugin.kernels.triton import scales
    from qalora_plugin.kernels.triton.grouped import Tiles

    plain = weight._replace(offsets=None)
    if place is None or not len(dy):
        by_slot = x if len(x) == len(dy) else x.repeat_interleave(len(dy) // len(x), 0)
        return scales.factor_gradient(by_slot, dy, plain, tiles)
    x, dy, share, rows = representatives(x, dy, max(1, len(dy) // every), place)
    return scales.factor_gradient(x, dy, plain, Tiles.of(tiles.owners()[rows, None].long(), len(weight.scales))) * share


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


def _changed(
    weight: GroupwiseWeight, a: Tensor | None, b: Tensor | None, scaling: float, d: Tensor | None, c: Tensor | None
) -> tuple[GroupwiseWeight, Tensor | None]:
    """The weight with trained scales, if they are; and its offsets ``[E, G, N]`` with what an adapter adds, float32."""
    with torch.autocast(weight.qweight.device.type, enabled=False):  # which would multiply factors in 16 bits
        offsets = None if weight.offsets is None else weight.offsets.float()
        if a is not None and b is not None:
            a, b = _of_each(a, len(b)).float().mT, b.float().mT
            if d is not None:
                added = (torch.bmm(a, b) * scaling).mul_(weight.scales)
                offsets = added if offsets is None else added.add_(offsets)
            elif offsets is None:
                offsets = torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scaling)
            else:
                offsets = torch.baddbmm(offsets, a, b, alpha=scaling)
        if d is not None and c is not None:
            weight = weight._replace(scales=ScaleDelta(d, c).materialize(weight.scales))
    return weight, None if offsets is None else offsets.contiguous()


def _of_each(lora_a: Tensor, experts: int) -> Tensor:
    return lora_a if lora_a.ndim == 3 else lora_a.expand(experts, -1, -1)


def _by_row(by_slot: Tensor, rows: int) -> Tensor:
    """Gradients of slots added up for the row of x that they share."""
    return by_slot if rows == len(by_slot) else by_slot.unflatten(0, (rows, -1)).sum(1)
