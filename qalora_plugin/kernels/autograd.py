"""``y = x·(w + offsets)`` straight from the packed weight, with the adapter folded in: one GEMM, no dense weight kept.

    forward    w' = dequant(q, scales, zeros, offsets + α/R·(B·A)ᵀ)                  y  = x·w'
    backward   w' again, from the packed tensors                                     dx = dy·w'ᵀ
               dB = α/R · dyᵀ·(P(x)·Aᵀ)                                              dA = α/R · (dy·B)ᵀ·P(x)

With trained scales:

    forward    w' = dequant(q, scales ⊙ (1 + D·C), zeros, offsets + scales ⊙ α/R·(B·A)ᵀ)
    backward   dA and dB through scales ⊙ (P(x)ᵀ·dy) [G, N]
               dD = dM·Cᵀ, dC = Dᵀ·dM, where dM is the gradient of D·C: :mod:`.scales`

Between the two only ``P(x)`` is saved, 1/g of ``x``; with trained scales also ``x`` itself, as any LoRA saves it. The
product that dM is made of would cost half as much again as all others, so that one token in n stands for all of them
(:func:`~.scales.representatives`). The weight multiplied here is, up to the rounding of the stored offsets and scales,
the one that the merged checkpoint serves.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from qalora_plugin.core.delta import OffsetDelta, ScaleDelta, scaled_product
from qalora_plugin.core.weight import GroupwiseWeight, completed
from qalora_plugin.kernels.base import Kernel
from qalora_plugin.kernels.hardware import autocast, gemm_dtype
from qalora_plugin.kernels.scales import factor_gradient, in_steps, representatives
from qalora_plugin.kernels.select import choose
from qalora_plugin.kernels.unpacking import product


def linear(
    x: Tensor,
    weight: GroupwiseWeight,
    delta: OffsetDelta | None = None,
    scale_delta: ScaleDelta | None = None,
    beside: tuple[Tensor | None, ...] = (None, None, None),
) -> Tensor:
    """``x·w'`` in the dtype of x (the autocast dtype under autocast).

    Args:
        x: ``[..., K]``.
        delta: in units of ``w``; of its scales, as they were, if there is a ``scale_delta``.
        beside: what ``w`` is completed by (:func:`~qalora_plugin.core.weight.completed`), in forward and in backward:
            between the two it stays as it is stored.

    Returns:
        ``[..., N]``.
    """
    changes = *(delta or (None, None, 1.0)), *(scale_delta or (None, None, 1))
    return _GroupwiseLinear.apply(autocast(x), *changes, weight, beside)


def _is_abstract(x: Tensor) -> bool:
    """Whether it has a shape and no numbers, as where memory is estimated: then the ops below say what they give."""
    return x.is_meta or isinstance(x, FakeTensor)


class _GroupwiseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, d: Tensor | None,
        c: Tensor | None, every: int, weight: GroupwiseWeight, beside: tuple[Tensor | None, ...],
    ) -> Tensor:  # fmt: skip
        run = _forward_op if torch.compiler.is_compiling() or _is_abstract(x) else _forward
        keep_pooled, wants_scales = any(ctx.needs_input_grad[1:3]), any(ctx.needs_input_grad[4:6])
        whole = completed(weight, *beside)
        factors, stored = (lora_a, lora_b, scaling, d, c), (whole.tensors, whole.bits, whole.group_size)
        y, pooled, place = run(x, *factors, keep_pooled, every > 1, *stored)
        ctx.scaling, ctx.weight, ctx.beside, ctx.every = scaling, weight, beside, every
        ctx.save_for_backward(pooled, place if len(place) else None, x if wants_scales else None, lora_a, lora_b, d, c)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        run = _backward_op if torch.compiler.is_compiling() or _is_abstract(dy) else _backward
        wants_dx, wants_a, wants_b, _, wants_d, wants_c, *_ = ctx.needs_input_grad
        pooled, place, x, lora_a, lora_b, d, c = ctx.saved_tensors
        weight = completed(ctx.weight, *ctx.beside)
        dx, da, db, dd, dc = run(
            dy, pooled, place, x, ctx.every, lora_a, lora_b, ctx.scaling, d, c, wants_dx, wants_a or wants_b,
            weight.tensors, weight.bits, weight.group_size,
        )  # fmt: skip
        found = ((dx, wants_dx), (da, wants_a), (db, wants_b), (None, False), (dd, wants_d), (dc, wants_c))
        return *(gradient if wanted else None for gradient, wanted in found), None, None, None


def _forward(
    x: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    d: Tensor | None,
    c: Tensor | None,
    keep_pooled: bool,
    samples: bool,
    tensors: list[Tensor | None],
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``; ``P(x)`` (empty unless ``keep_pooled``); if ``samples``, a random number in [0, 1) (else empty).

    It is drawn here, from torch's own generator on the CPU, which checkpointing and resuming put back; and whether
    gradients are recorded or not: reentrant checkpointing runs a block first without, then with, and both draw alike.
    The last three arguments are a GroupwiseWeight.
    """
    weight = GroupwiseWeight.of(tensors, bits, group_size)
    delta = None if lora_a is None or lora_b is None else OffsetDelta(lora_a, lora_b, scaling)
    with torch.autocast(x.device.type, enabled=False):
        changed, delta = in_steps(weight, delta, d, c)
        y = choose(changed, x.dtype, x.numel() // x.shape[-1]).forward(x, changed, delta)
        # After y: allocated before it, what is kept would break up the free memory that y fits into.
        pooled = choose(weight, x.dtype).pool(x, weight) if keep_pooled else x.new_empty(0)
        return y, pooled, torch.rand(1 if samples else 0, dtype=torch.float32, device="cpu")


def _backward(
    dy: Tensor,
    pooled: Tensor,
    place: Tensor | None,
    x: Tensor | None,
    every: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    d: Tensor | None,
    c: Tensor | None,
    wants_dx: bool,
    wants_adapter: bool,
    tensors: list[Tensor | None],
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, B, D and C; empty where not wanted.

    Args:
        pooled: ``P(x)``, if ``wants_adapter``.
        place, x, every: if those of D and C are wanted, x ``[…, K]``, of which one token in ``every`` stands for all;
            which ones, ``place`` decides.
    """
    weight = GroupwiseWeight.of(tensors, bits, group_size)
    delta = None if lora_a is None or lora_b is None else OffsetDelta(lora_a, lora_b, scaling)
    dx, da, db, dd, dc = (dy.new_empty(0) for _ in range(5))
    kernel = choose(weight, dy.dtype)
    with torch.autocast(dy.device.type, enabled=False):
        if wants_dx:
            dx = kernel.grad_input(dy, *in_steps(weight, delta, d, c))
        dy = dy.reshape(-1, dy.shape[-1])
        if wants_adapter and delta is not None:
            unit = None if d is None else weight.scales
            da, db = _adapter_gradients(dy, pooled.reshape(-1, pooled.shape[-1]), delta, unit, kernel)
        if x is not None and d is not None and c is not None:
            x, share = x.reshape(-1, x.shape[-1]), None
            if place is not None and len(x):
                x, dy, share, _ = representatives(x, dy, max(1, len(x) // every), place)
            gradient = factor_gradient(x, dy, weight).to(torch.promote_types(d.dtype, torch.float32))
            dd, dc = ScaleDelta(d, c).gradients(gradient)
            dd, dc = (part if share is None else part * share for part in (dd, dc))
            dd, dc = dd.to(d.dtype), dc.to(c.dtype)
    return dx, da, db, dd, dc


# The same two as ops that torch.compile does not look into: a compiled model stays one graph. Not for Inductor's CUDA
# graphs, whose memory pool must not own the scratch.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_forward_op = torch.library.custom_op("qalora::linear", _forward, mutates_args=(), tags=_TAGS)
_backward_op = torch.library.custom_op("qalora::linear_backward", _backward, mutates_args=(), tags=_TAGS)


@_forward_op.register_fake
def _(
    x: Tensor, lora_a: Any, lora_b: Any, scaling: float, d: Any, c: Any, keep_pooled: bool, samples: bool,
    tensors: Any, bits: int, group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    groups, out_features = tensors[2].shape
    pooled = x.new_empty(*x.shape[:-1], groups) if keep_pooled else x.new_empty(0)
    place = torch.empty(1 if samples else 0, dtype=torch.float32, device="cpu")
    return x.new_empty(*x.shape[:-1], out_features), pooled, place


@_backward_op.register_fake
def _(
    dy: Tensor, pooled: Tensor, place: Any, x: Any, every: int, lora_a: Any, lora_b: Any, scaling: float, d: Any,
    c: Any, wants_dx: bool, wants_adapter: bool, tensors: Any, bits: int, group_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    groups = tensors[2].shape[0]
    dx = dy.new_empty(*dy.shape[:-1], groups * group_size) if wants_dx else dy.new_empty(0)
    da, db = (torch.empty_like(t) if wants_adapter else dy.new_empty(0) for t in (lora_a, lora_b))
    dd, dc = (dy.new_empty(0) if x is None else torch.empty_like(t) for t in (d, c))
    return dx, da, db, dd, dc


def _adapter_gradients(
    dy: Tensor, pooled: Tensor, delta: OffsetDelta, unit: Tensor | None, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """dA ``[R, G]`` and dB ``[N, R]`` of dy ``[T, N]`` and P(x) ``[T, G]``.

    Few groups, or a unit: through ``dE = P(x)ᵀ·dy`` [G, N], which reads dy once. Many: factored, through ``dy·B`` and
    ``P(x)·Aᵀ`` [T, R], which reads it twice and multiplies less. These products are bound by memory: on a CPU, one pass
    over dy still wins at twice the multiplications (G = 4·R). They run in dy's dtype (summed in float32) as any LoRA's
    do, where the device multiplies in it.

    Args:
        unit: ``[G, N]``, of ``delta``; None: 1.
    """
    lora_a, lora_b, scaling = delta
    if unit is not None or pooled.shape[1] <= 4 * len(lora_a):
        gradient = kernel.offset_gradient(pooled, dy).to(torch.promote_types(lora_a.dtype, torch.float32))
        da, db = delta.gradients(gradient if unit is None else gradient * unit)
    else:
        dtype = gemm_dtype(dy.dtype, dy.device)
        dy, pooled, a, b = (t.to(dtype) for t in (dy, pooled, lora_a, lora_b))
        da = product(scaled_product(dy, b, scaling).t(), pooled)
        db = product(dy.t(), scaled_product(pooled, a.t(), scaling))
    return da.to(lora_a.dtype), db.to(lora_b.dtype)
