"""Unpack the weight into the scratch, then multiply by torch's GEMM: works everywhere, and on a GPU it is the fast way.

Triton unpacks on CUDA, C++ on a CPU, plain torch the rest (float64; other devices; 3 bits and act-order on a CPU).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels import cpu, planes
from qalora_plugin.kernels.hardware import gemm_dtype, runs_triton
from qalora_plugin.kernels.pooling import pool
from qalora_plugin.kernels.workspace import scratch


@contextmanager
def dequantized(weight: GroupwiseWeight, dtype: torch.dtype, delta: OffsetDelta | None = None) -> Iterator[Tensor]:
    """``w'``, dense ``[K, N]``, in the shared scratch: gone after the ``with`` block.

    Args:
        dtype: of the result; arithmetic is float32 or better, rounded once.
    """
    with scratch(weight.in_features, weight.out_features, dtype, weight.qweight.device) as out:
        with torch.no_grad():
            fill(weight, delta, out)
        yield out


def fill(weight: GroupwiseWeight, delta: OffsetDelta | None, out: Tensor) -> None:
    """Write ``w'`` to ``out`` ``[K, N]``."""
    if cpu.why_not_fill(weight, out.dtype) is None:
        cpu.fill(weight, delta, out)
        return
    offsets = weight.offsets if delta is None else delta.materialize(weight.offsets)
    if runs_triton(out):
        from qalora_plugin.kernels.triton import dequantize  # Triton is not everywhere

        dequantize.fill(weight, offsets, out)
    else:
        planes.fill(weight, offsets, out)


class UnpackAndMultiply:
    """A :class:`~.base.Kernel` for every weight, dtype and device."""

    def why_not(self, weight: GroupwiseWeight, dtype: torch.dtype, tokens: int | None = None) -> str | None:
        return None

    def describe(self, weight: GroupwiseWeight, dtype: torch.dtype) -> str:
        device = weight.qweight.device
        if runs_triton(torch.empty(0, dtype=dtype, device=device)):
            return "Triton unpacks, cuBLAS multiplies; few tokens in one Triton kernel"
        gemm = gemm_dtype(dtype, device)
        by = "plain torch unpacks" if cpu.why_not_fill(weight, gemm) else "C++ unpacks"
        return f"{by}, then torch's GEMM in {gemm}"

    def forward(self, x: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None) -> Tensor:
        dtype = gemm_dtype(x.dtype, x.device)
        with dequantized(weight, dtype, delta) as dense:
            return (x.to(dtype) @ dense).to(x.dtype)

    def grad_input(self, dy: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None) -> Tensor:
        dtype = gemm_dtype(dy.dtype, dy.device)
        with dequantized(weight, dtype, delta) as dense:
            return (dy.to(dtype) @ dense.t()).to(dy.dtype)

    def pool(self, x: Tensor, weight: GroupwiseWeight) -> Tensor:
        return pool(x, weight)

    def offset_gradient(self, pooled: Tensor, dy: Tensor) -> Tensor:
        dtype = gemm_dtype(dy.dtype, dy.device)
        return product(pooled.to(dtype).t(), dy.to(dtype))


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a·b``, on CUDA in float32 as it was summed: no rounding, and no kernel to convert it."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b
