"""``y = x·(w + offsets)`` straight from the packed weight, with the adapter folded in: one GEMM, no dense weight kept.

    forward    w' = dequant(q, scales, zeros, offsets + α/R·(B·A)ᵀ)      y  = x·w'
    backward   w' again, from the packed tensors                         dx = dy·w'ᵀ
               dB = α/R · dyᵀ·(P(x)·Aᵀ)                                  dA = α/R · (dy·B)ᵀ·P(x)

Between the two only ``P(x)`` is saved, 1/g of ``x``. The weight multiplied here is, up to the rounding of the stored
offsets, the one that the merged checkpoint serves.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qalora_plugin.core.delta import OffsetDelta, scaled_product
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels.base import Kernel
from qalora_plugin.kernels.hardware import gemm_dtype
from qalora_plugin.kernels.select import choose
from qalora_plugin.kernels.unpacking import product


def linear(x: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None = None) -> Tensor:
    """``x·w + P(x)·offsets + scaling·P(x)·Aᵀ·Bᵀ`` in the dtype of x (the autocast dtype under autocast).

    Args:
        x: ``[..., K]``.

    Returns:
        ``[..., N]``.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _GroupwiseLinear.apply(x, *(delta or (None, None, 1.0)), weight)


class _GroupwiseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, weight: GroupwiseWeight):
        run = _forward_op if torch.compiler.is_compiling() else _forward
        wants_adapter = any(ctx.needs_input_grad[1:3])
        y, pooled = run(x, lora_a, lora_b, scaling, wants_adapter, weight.tensors, weight.bits, weight.group_size)
        ctx.scaling, ctx.weight = scaling, weight
        ctx.save_for_backward(pooled, lora_a, lora_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        run = _backward_op if torch.compiler.is_compiling() else _backward
        wants_dx, wants_a, wants_b = ctx.needs_input_grad[:3]
        weight = ctx.weight
        dx, da, db = run(
            dy, *ctx.saved_tensors, ctx.scaling, wants_dx, wants_a or wants_b,
            weight.tensors, weight.bits, weight.group_size,
        )  # fmt: skip
        return dx if wants_dx else None, da if wants_a else None, db if wants_b else None, None, None


def _forward(
    x: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    keep_pooled: bool,
    tensors: list[Tensor | None],
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Returns ``y`` and ``P(x)`` (empty unless ``keep_pooled``). The last three arguments are a GroupwiseWeight."""
    weight = GroupwiseWeight.of(tensors, bits, group_size)
    delta = None if lora_a is None else OffsetDelta(lora_a, lora_b, scaling)
    with torch.autocast(x.device.type, enabled=False):
        y = choose(weight, x.dtype, x.numel() // x.shape[-1]).forward(x, weight, delta)
        # After y: allocated before it, what is kept would break up the free memory that y fits into.
        return y, choose(weight, x.dtype).pool(x, weight) if keep_pooled else x.new_empty(0)


def _backward(
    dy: Tensor,
    pooled: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    wants_dx: bool,
    wants_adapter: bool,
    tensors: list[Tensor | None],
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A and B; empty where not wanted."""
    weight = GroupwiseWeight.of(tensors, bits, group_size)
    delta = None if lora_a is None else OffsetDelta(lora_a, lora_b, scaling)
    dx, da, db = (dy.new_empty(0) for _ in range(3))
    kernel = choose(weight, dy.dtype)
    with torch.autocast(dy.device.type, enabled=False):
        if wants_dx:
            dx = kernel.grad_input(dy, weight, delta)
        if wants_adapter:
            da, db = _adapter_gradients(dy.flatten(0, -2), pooled.flatten(0, -2), delta, kernel)
    return dx, da, db


# The same two as ops that torch.compile does not look into: a compiled model stays one graph. Not for Inductor's CUDA
# graphs, whose memory pool must not own the scratch.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_forward_op = torch.library.custom_op("qalora::linear", _forward, mutates_args=(), tags=_TAGS)
_backward_op = torch.library.custom_op("qalora::linear_backward", _backward, mutates_args=(), tags=_TAGS)


@_forward_op.register_fake
def _(x, lora_a, lora_b, scaling, keep_pooled, tensors, bits, group_size):
    groups, out_features = tensors[2].shape
    pooled = x.new_empty(*x.shape[:-1], groups) if keep_pooled else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], out_features), pooled


@_backward_op.register_fake
def _(dy, pooled, lora_a, lora_b, scaling, wants_dx, wants_adapter, tensors, bits, group_size):
    groups = tensors[2].shape[0]
    dx = dy.new_empty(*dy.shape[:-1], groups * group_size) if wants_dx else dy.new_empty(0)
    da, db = (torch.empty_like(t) if wants_adapter else dy.new_empty(0) for t in (lora_a, lora_b))
    return dx, da, db


def _adapter_gradients(dy: Tensor, pooled: Tensor, delta: OffsetDelta, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """dA ``[R, G]`` and dB ``[N, R]`` of dy ``[T, N]`` and P(x) ``[T, G]``.

    Few groups: through ``dE = P(x)ᵀ·dy`` [G, N], which reads dy once. Many: factored, through ``dy·B`` and ``P(x)·Aᵀ``
    [T, R], which reads it twice and multiplies less. These products are bound by memory: on a CPU, one pass over dy
    still wins at twice the multiplications (G = 4·R). They run in dy's dtype (summed in float32) as any LoRA's do,
    where the device multiplies in it.
    """
    lora_a, lora_b, scaling = delta
    if pooled.shape[1] <= 4 * len(lora_a):
        gradient = kernel.offset_gradient(pooled, dy)
        da, db = delta.gradients(gradient.to(torch.promote_types(lora_a.dtype, torch.float32)))
    else:
        dtype = gemm_dtype(dy.dtype, dy.device)
        dy, pooled, a, b = (t.to(dtype) for t in (dy, pooled, lora_a, lora_b))
        da = product(scaled_product(dy, b, scaling).t(), pooled)
        db = product(dy.t(), scaled_product(pooled, a.t(), scaling))
    return da.to(lora_a.dtype), db.to(lora_b.dtype)
