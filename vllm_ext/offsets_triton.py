"""``y += P(x)·offsets`` on CUDA, in Triton, accumulated in float32 and rounded once.

Decoding one sequence is bound by launches, so up to four rows run as ONE kernel: each program pools x for its own tile of
y and adds the product in place. Every tile of N pools x again; from L2 that is free for a few rows (K 4096: 8 KB a row)
and would be the whole cost for more. More rows are pooled once (``kernels/pool_triton.py``), all groups at the same time,
and a second kernel multiplies.

x may be float16, bfloat16 or float32, offsets any of them; K = G·g with any group size. Products of up to four rows are
float32 multiply-adds; more rows use the tensor cores' tf32, whose 10-bit mantissa holds float16 offsets exactly and whose
range no sum of activations leaves (float16 would overflow, bfloat16 would round offsets by 0.2 %). Where x or the offsets
are float32, tf32x3 keeps about float32's precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qalora_plugin.kernels.pool_triton import pool

FEW_ROWS = 4
_TILE = 8192  # numbers of x that a program of the first kernel holds at once


@triton.jit(do_not_specialize=["M"])  # or every other batch size would compile anew
def few_kernel(
    y_ptr, x_ptr, offsets_ptr, M, N, G, g, stride_y, stride_x,
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
        total += pooled[:, :, None] * offsets[None, :, :]
    place = y_ptr + rows.to(tl.int64)[:, None] * stride_y + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    y = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (y.to(tl.float32) + tl.sum(total, axis=1)).to(y.dtype), mask=inside)


@triton.jit(do_not_specialize=["M"])
def add_kernel(
    y_ptr, pooled_ptr, offsets_ptr, M, N, G, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_M, BLOCK_N]`` of y. PRECISION: ``input_precision`` of ``tl.dot``."""
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
        total = tl.dot(pooled, offsets, total, input_precision=PRECISION)
    tl.store(place, total.to(y.dtype), mask=inside)


def add_offsets(y: Tensor, x: Tensor, offsets: Tensor) -> None:
    """``y += P(x)·offsets`` in place.

    Args:
        y: ``[M, N]``, x: ``[M, K]``, rows of contiguous elements, any row stride. offsets: ``[G, N]``, contiguous.
    """
    (m, n), groups = y.shape, offsets.shape[0]
    if m == 0:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    if m <= FEW_ROWS:
        g = x.shape[1] // groups
        blocks = blocks_of_few(m, g)
        grid = (triton.cdiv(n, blocks["BLOCK_N"]),)
        few_kernel[grid](y, x, offsets, m, n, groups, g, y.stride(0), x.stride(0), **blocks)
        return
    blocks = blocks_of_pooled(m, groups, torch.float32 in (x.dtype, offsets.dtype))
    grid = (triton.cdiv(n, blocks["BLOCK_N"]), triton.cdiv(m, blocks["BLOCK_M"]))
    add_kernel[grid](y, pool(x, groups, torch.float32), offsets, m, n, groups, y.stride(0), **blocks)


def blocks_of_few(rows: int, group_size: int) -> dict[str, int]:
    """Constants of :func:`few_kernel`. Each step waits for memory: few, large ones, within the registers."""
    m = triton.next_power_of_2(rows)
    g = max(16, min(64, _TILE // 2 // triton.next_power_of_2(group_size)) // m)
    i = min(triton.next_power_of_2(group_size), max(1, _TILE // (m * g)))
    return {"BLOCK_M": m, "BLOCK_N": 64, "BLOCK_G": g, "BLOCK_I": i}


def blocks_of_pooled(rows: int, groups: int, exact: bool) -> dict[str, int | str]:
    """Constants of :func:`add_kernel`. exact: x or the offsets are float32."""
    m = 16 if rows <= 32 else 64
    g = min(128 if m == 16 else 32, max(16, triton.next_power_of_2(groups)))
    return {"BLOCK_M": m, "BLOCK_N": 64 if m == 16 else 128, "BLOCK_G": g, "PRECISION": "tf32x3" if exact else "tf32"}
