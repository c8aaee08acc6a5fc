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

from . import cpu
from .dequant import dequantized, effective_offsets, gemm_dtype, runs_triton, scaled_product
from .packed import PackedWeight


def pool(x: Tensor, packed: PackedWeight) -> Tensor:
    """``P(x)``: x summed over each quantisation group, ``[..., K] → [..., G]``. Differentiable."""
    if packed.group_order is not None:
        x = x.index_select(-1, packed.group_order)
    if runs_triton(x) and x.numel():
        return _Pool.apply(x.contiguous(), packed.groups)
    return x.unflatten(-1, (packed.groups, packed.group_size)).sum(-1)


class _Pool(torch.autograd.Function):
    """The sum over groups in order, by a kernel of its own (Triton)."""

    @staticmethod
    def forward(ctx, x: Tensor, groups: int) -> Tensor:
        from . import pool_triton  # Triton is not everywhere

        ctx.group_size = x.shape[-1] // groups
        return pool_triton.pool(x, groups, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.repeat_interleave(ctx.group_size, dim=-1), None


def linear(
    x: Tensor, packed: PackedWeight, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """``x·w + P(x)·offsets + scaling·P(x)·Aᵀ·Bᵀ`` in the dtype of x (the autocast dtype under autocast).

    Args:
        x: ``[..., K]``. lora_a: ``[R, G]``, lora_b: ``[N, R]``, both or neither.

    Returns:
        ``[..., N]``.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _PackedLinear.apply(x, lora_a, lora_b, scaling, packed)


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, packed: PackedWeight):
        run = _forward_op if torch.compiler.is_compiling() else _forward
        y, pooled = run(x, lora_a, lora_b, scaling, any(ctx.needs_input_grad[1:3]), *packed)
        ctx.scaling, ctx.packed = scaling, packed
        ctx.save_for_backward(pooled, lora_a, lora_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        run = _backward_op if torch.compiler.is_compiling() else _backward
        wants_dx, wants_a, wants_b = ctx.needs_input_grad[:3]
        dx, da, db = run(dy, *ctx.saved_tensors, ctx.scaling, wants_dx, wants_a or wants_b, *ctx.packed)
        return dx if wants_dx else None, da if wants_a else None, db if wants_b else None, None, None


def _forward(
    x: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    keep_pooled: bool,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    g_idx: Tensor | None,
    group_order: Tensor | None,
    bits: int,
    group_size: int,
    checkpoint_format: str,
) -> tuple[Tensor, Tensor]:
    """Returns ``y`` and ``P(x)`` (empty unless ``keep_pooled``)."""
    packed = PackedWeight(qweight, qzeros, scales, offsets, g_idx, group_order, bits, group_size, checkpoint_format)
    with torch.autocast(x.device.type, enabled=False):
        y = _multiply(x, packed, lora_a, lora_b, scaling)
        # After y: allocated before it, what is kept would break up the free memory that y fits into.
        if not keep_pooled:
            return y, x.new_empty(0)
        return y, cpu.pool(x, packed.groups) if cpu.multiplies(packed, x.dtype) else pool(x, packed)


def _backward(
    dy: Tensor,
    pooled: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    wants_dx: bool,
    wants_adapter: bool,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    g_idx: Tensor | None,
    group_order: Tensor | None,
    bits: int,
    group_size: int,
    checkpoint_format: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A and B; empty where not wanted."""
    packed = PackedWeight(qweight, qzeros, scales, offsets, g_idx, group_order, bits, group_size, checkpoint_format)
    dx, da, db = (dy.new_empty(0) for _ in range(3))
    with torch.autocast(dy.device.type, enabled=False):
        if wants_dx:
            dx = _multiply_transposed(dy, packed, lora_a, lora_b, scaling)
        if wants_adapter:
            da, db = _adapter_gradients(
                dy.flatten(0, -2), pooled.flatten(0, -2), lora_a, lora_b, scaling, cpu.multiplies(packed, dy.dtype)
            )
    return dx, da, db


# The same two as ops that torch.compile does not look into: a compiled model stays one graph. Not for Inductor's CUDA
# graphs, whose memory pool must not own the scratch.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_forward_op = torch.library.custom_op("qalora::linear", _forward, mutates_args=(), tags=_TAGS)
_backward_op = torch.library.custom_op("qalora::linear_backward", _backward, mutates_args=(), tags=_TAGS)


@_forward_op.register_fake
def _(x, lora_a, lora_b, scaling, keep_pooled, qweight, qzeros, scales, *_):
    groups, out_features = scales.shape
    pooled = x.new_empty(*x.shape[:-1], groups) if keep_pooled else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], out_features), pooled


@_backward_op.register_fake
def _(dy, pooled, lora_a, lora_b, scaling, wants_dx, wants_adapter, qweight, qzeros, scales, *rest):
    *_, group_size, _ = rest
    dx = dy.new_empty(*dy.shape[:-1], scales.shape[0] * group_size) if wants_dx else dy.new_empty(0)
    da, db = (torch.empty_like(t) if wants_adapter else dy.new_empty(0) for t in (lora_a, lora_b))
    return dx, da, db


def _multiply(x: Tensor, packed: PackedWeight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
    """``x·w'``: through the scratch, or without it where that is faster (on CUDA for a few tokens, and measured)."""
    if cpu.multiplies(packed, x.dtype):
        return cpu.matmul(x, packed, lora_a, lora_b, scaling)
    if runs_triton(x):
        from . import gpu  # Triton is not everywhere

        if gpu.takes_matmul(x, packed) and gpu.matmul_wins(x, packed):
            return gpu.matmul(x, packed, effective_offsets(packed.offsets, lora_a, lora_b, scaling))
    dtype = gemm_dtype(x.dtype, x.device)
    with dequantized(packed, dtype, lora_a, lora_b, scaling) as weight:
        return (x.to(dtype) @ weight).to(x.dtype)


def _multiply_transposed(
    dy: Tensor, packed: PackedWeight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float
) -> Tensor:
    """``dy·w'ᵀ``, likewise."""
    if cpu.multiplies(packed, dy.dtype):
        return cpu.matmul_transposed(dy, packed, lora_a, lora_b, scaling)
    dtype = gemm_dtype(dy.dtype, dy.device)
    with dequantized(packed, dtype, lora_a, lora_b, scaling) as weight:
        return (dy.to(dtype) @ weight.t()).to(dy.dtype)


def _adapter_gradients(
    dy: Tensor, pooled: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """dA ``[R, G]`` and dB ``[N, R]`` of dy ``[T, N]`` and P(x) ``[T, G]``.

    Few groups: through ``dE = P(x)ᵀ·dy`` [G, N], which reads dy once. Many: factored, through ``dy·B`` and ``P(x)·Aᵀ``
    [T, R], which reads it twice and multiplies less. These products are bound by memory: on a CPU, one pass over dy
    still wins at twice the multiplications (G = 4·R). They run in dy's dtype (summed in float32) as any LoRA's do,
    where the device multiplies in it; ``compiled``: dE by the CPU kernel, which does not round it.
    """
    if not compiled:
        dtype = gemm_dtype(dy.dtype, dy.device)
        dy, pooled = dy.to(dtype), pooled.to(dtype)
    if pooled.shape[1] <= 4 * len(lora_a):
        math_dtype = torch.promote_types(lora_a.dtype, torch.float32)
        a, b = lora_a.to(math_dtype), lora_b.to(math_dtype)
        de = (cpu.offset_gradient(pooled, dy) if compiled else _product(pooled.t(), dy)).to(math_dtype)
        da, db = scaled_product(b.t(), de.t(), scaling), scaled_product(de.t(), a.t(), scaling)
    else:
        a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
        da = _product(scaled_product(dy, b, scaling).t(), pooled)
        db = _product(dy.t(), scaled_product(pooled, a.t(), scaling))
    return da.to(lora_a.dtype), db.to(lora_b.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a·b``, on CUDA in float32 as it was summed: no rounding, and no kernel to convert it."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b
