"""``y += P(x)·offsets`` on CUDA.

Decoding is bound by launches. Up to four rows run as ONE kernel: each program pools x for its own tile of y and adds
the product in place. Every tile of N pools x again; from L2 that is free for a few rows (K 4096: 8 KB a row) and would
be the whole cost for more. More rows are pooled once (``kernels/triton/pooling.py``), and cuBLAS multiplies and adds in
place. Of offsets that are held as factors, ``a·b``, each program of the one kernel multiplies what it has pooled by a
as well; for more rows cuBLAS multiplies twice.

Pooled inputs and offsets are rounded to x's dtype, 0.2 % of the term in bfloat16, as every bfloat16 kernel rounds its
scales. A sum of float16 activations could overflow: what is multiplied is the sum divided by a power of two of at least
g, and the offsets are stored multiplied by it, both without rounding. Offsets in float32 (asked for, or because
zero-points were moved into them) are not rounded: a kernel of our own multiplies in tf32x3, about float32's precision.

Block sizes are the fastest on an H100 (``benchmarks/gpu_check.py``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qalora_plugin.kernels.triton.pooling import pool

FEW_ROWS = 4
_TILE = 8192  # numbers of x that a program of the first kernel holds at once
BLOCKS_OF_POOLED = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_G": 32}  # constants of add_kernel


@triton.jit(do_not_specialize=["M"])  # or every other batch size would compile anew
def few_kernel(
    y_ptr, x_ptr, offsets_ptr, M, N, G, g, stride_y, stride_x, divisor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """All rows of ``BLOCK_N`` columns of y; pools ``BLOCK_G`` groups a step, ``BLOCK_I`` of their columns at a time."""
    rows, columns = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = rows.to(tl.int64)[:, None, None] * stride_x
    total = tl.zeros((BLOCK_M, BLOCK_G, BLOCK_N), dtype=tl.float32)  # summed over groups at the end: barriers are slow
    for first in range(0, G, BLOCK_G):
        groups = first + tl.arange(0, BLOCK_G)
        inside = (groups < G)[:, None] & (columns < N)[None, :]
        offsets = tl.load(offsets_ptr + groups[:, None] * N + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        pooled = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)
        there = (rows < M)[:, None, None] & (groups < G)[None, :, None]
        for i in range(0, g, BLOCK_I):
            column = i + tl.arange(0, BLOCK_I)[None, None, :]
            x = tl.load(x_ptr + start + (groups * g)[None, :, None] + column, mask=there & (column < g), other=0.0)
            pooled += tl.sum(x.to(tl.float32), axis=2)
        total += (pooled / divisor)[:, :, None] * offsets[None, :, :]
    place = y_ptr + rows.to(tl.int64)[:, None] * stride_y + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    y = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (y.to(tl.float32) + tl.sum(total, axis=1)).to(y.dtype), mask=inside)


@triton.jit(do_not_specialize=["M"])
def few_factored_kernel(
    y_ptr, x_ptr, a_ptr, b_ptr, M, N, G, R, g, stride_y, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """As :func:`few_kernel`, for offsets ``a·b``: a program multiplies all groups by a, then that by its tile of b."""
    rows, columns = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    start = rows.to(tl.int64)[:, None, None] * stride_x
    narrow = tl.zeros((BLOCK_M, BLOCK_G, BLOCK_R), dtype=tl.float32)
    for first in range(0, G, BLOCK_G):
        groups = first + tl.arange(0, BLOCK_G)
        inside = (groups < G)[:, None] & (ranks < R)[None, :]
        a = tl.load(a_ptr + groups[:, None] * R + ranks[None, :], mask=inside, other=0.0)
        pooled = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)
        there = (rows < M)[:, None, None] & (groups < G)[None, :, None]
        for i in range(0, g, BLOCK_I):
            column = i + tl.arange(0, BLOCK_I)[None, None, :]
            x = tl.load(x_ptr + start + (groups * g)[None, :, None] + column, mask=there & (column < g), other=0.0)
            pooled += tl.sum(x.to(tl.float32), axis=2)
        narrow += pooled[:, :, None] * a[None, :, :]
    inside = (ranks < R)[:, None] & (columns < N)[None, :]
    b = tl.load(b_ptr + ranks[:, None] * N + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(tl.sum(narrow, axis=1)[:, :, None] * b[None, :, :], axis=1)
    place = y_ptr + rows.to(tl.int64)[:, None] * stride_y + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    y = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (y.to(tl.float32) + total).to(y.dtype), mask=inside)


@triton.jit(do_not_specialize=["M"])
def add_kernel(
    y_ptr, pooled_ptr, offsets_ptr, M, N, G, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_M, BLOCK_N]`` of y, in float32."""
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    place = y_ptr + rows.to(tl.int64)[:, None] * stride_y + columns[None, :]
    y = tl.load(place, mask=inside, other=0.0)
    total = y.to(tl.float32)
    for first in range(0, G, BLOCK_G):
        groups = first + tl.arange(0, BLOCK_G)
        here = (rows < M)[:, None] & (groups < G)[None, :]
        pooled = tl.load(pooled_ptr + rows.to(tl.int64)[:, None] * G + groups[None, :], mask=here, other=0.0)
        there = (groups < G)[:, None] & (columns < N)[None, :]
        offsets = tl.load(offsets_ptr + groups[:, None] * N + columns[None, :], mask=there, other=0.0).to(tl.float32)
        total = tl.dot(pooled, offsets, total, input_precision="tf32x3")
    tl.store(place, total.to(y.dtype), mask=inside)


def prepare(offsets: Tensor, act_dtype: torch.dtype, group_size: int) -> Tensor:
    """Offsets ``[G, N]`` as :func:`add_offsets` reads them: float32, or multiplied and in the dtype of x."""
    if torch.float32 in (offsets.dtype, act_dtype):
        return offsets.float()
    prepared = (offsets.float() * _divisor(group_size)).to(act_dtype)
    return prepared if prepared.isfinite().all() else offsets.float()


def add_offsets(y: Tensor, x: Tensor, offsets: Tensor, group_size: int) -> None:
    """``y += P(x)·offsets`` in place.

    Args:
        y: ``[M, N]``, x: ``[M, K]``, rows of contiguous elements, any row stride. offsets: from :func:`prepare`.
    """
    (m, n), groups = y.shape, offsets.shape[0]
    if m == 0:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    divisor = 1 if offsets.dtype == torch.float32 else _divisor(group_size)
    if m <= FEW_ROWS:
        blocks = blocks_of_few(m, group_size)
        few_kernel[(triton.cdiv(n, blocks["BLOCK_N"]),)](
            y, x, offsets, m, n, groups, group_size, y.stride(0), x.stride(0), float(divisor), **blocks
        )
    elif offsets.dtype == torch.float32:
        grid = (triton.cdiv(n, BLOCKS_OF_POOLED["BLOCK_N"]), triton.cdiv(m, BLOCKS_OF_POOLED["BLOCK_M"]))
        pooled = pool(x, groups, torch.float32)
        add_kernel[grid](y, pooled, offsets, m, n, groups, y.stride(0), **BLOCKS_OF_POOLED)
    else:
        torch.addmm(y, pool(x, groups, x.dtype, divisor), offsets, out=y)


def prepare_factors(a: Tensor, b: Tensor, act_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors ``[G, r]``, ``[r, N]`` as :func:`add_factored` reads them: a, the small one, in float32, b in the dtype
    of x unless float32 was asked for."""
    prepared = b.float() if torch.float32 in (b.dtype, act_dtype) else b.to(act_dtype)
    return a.float(), prepared if prepared.isfinite().all() else b.float()


def add_factored(y: Tensor, x: Tensor, a: Tensor, b: Tensor, group_size: int) -> None:
    """``y += P(x)·a·b`` in place; y and x as for :func:`add_offsets`. a, b: from :func:`prepare_factors`."""
    (m, n), (groups, rank) = y.shape, a.shape
    if m == 0:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    if m <= FEW_ROWS:
        blocks = blocks_of_factors(m, rank, group_size)
        few_factored_kernel[(triton.cdiv(n, blocks["BLOCK_N"]),)](
            y, x, a, b, m, n, groups, rank, group_size, y.stride(0), x.stride(0), **blocks
        )
    elif b.dtype == torch.float32:
        y.add_(pool(x, groups, torch.float32) @ a @ b)
    else:
        torch.addmm(y, (pool(x, groups, torch.float32) @ a).to(b.dtype), b, out=y)


def _divisor(group_size: int) -> int:
    """Dividing by it keeps a sum of ``group_size`` numbers within the range of the numbers."""
    return triton.next_power_of_2(group_size)


def blocks_of_few(rows: int, group_size: int) -> dict[str, int]:
    """Constants of :func:`few_kernel`. Each step waits for memory: few, large ones, within the registers."""
    m = triton.next_power_of_2(rows)
    g = max(16, min(64, _TILE // triton.next_power_of_2(group_size)))
    i = min(triton.next_power_of_2(group_size), max(1, _TILE // (m * g)))
    return {"BLOCK_M": m, "BLOCK_N": 32, "BLOCK_G": g, "BLOCK_I": i}


def blocks_of_factors(rows: int, rank: int, group_size: int) -> dict[str, int]:
    """Constants of :func:`few_factored_kernel`; the product with a wide a takes its registers from the groups."""
    blocks = blocks_of_few(rows, group_size)
    wide = triton.next_power_of_2(rank)
    groups = max(16, min(blocks["BLOCK_G"], _TILE // (wide * blocks["BLOCK_M"])))
    return blocks | {"BLOCK_G": groups, "BLOCK_R": wide}
