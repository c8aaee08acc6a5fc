"""``y += P(x)·offsets`` on CUDA, in Triton, accumulated in float32 and rounded once.

Decoding is bound by launches and bytes, so few rows run as ONE kernel: each program pools x for its own tile of y and
adds the product in place. Every tile of N pools x again, N/BLOCK_N times in all. From L2 that is free for a few rows
(K 4096, N 4096: 0.3 MB a row, against 8 MB of weights), and would be the whole cost for many. So many rows are pooled
once, by a kernel of its own, and the same kernel then runs on the pooled rows as groups of one column.

x may be float16, bfloat16 or float32, offsets any of them; K = G·g with any group size. Products of up to four rows
are float32 multiply-adds; more rows use the tensor cores' tf32, whose 10-bit mantissa holds float16 offsets exactly and
whose range no sum of activations leaves (float16 would overflow, bfloat16 would round offsets by 0.2 %). Where x or the
offsets are float32, tf32x3 keeps about float32's precision.

Block sizes and thresholds are estimates from sizes of caches and tiles; no GPU has timed them yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_KERNEL_ROWS = 32
_FMA_ROWS = 4
_POOL_TILE = 8192  # elements of x that a program holds at once: 64 registers a thread


@triton.jit
def _pool_tile(
    x_ptr, stride_x, rows, groups, M, G, g, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_I: tl.constexpr
):
    """x of ``rows`` [BLOCK_M] summed over ``groups`` [BLOCK_G] → float32 [BLOCK_M, BLOCK_G]; BLOCK_I columns a step."""
    pooled = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)
    inside = (rows < M)[:, None, None] & (groups < G)[None, :, None]
    start = rows.to(tl.int64)[:, None, None] * stride_x + (groups * g)[None, :, None]
    for first in range(0, g, BLOCK_I):
        column = first + tl.arange(0, BLOCK_I)[None, None, :]
        x = tl.load(x_ptr + start + column, mask=inside & (column < g), other=0.0)
        pooled += tl.sum(x.to(tl.float32), axis=2)
    return pooled


@triton.jit(do_not_specialize=["M"])  # or every other batch size would compile anew
def add_kernel(
    y_ptr, x_ptr, offsets_ptr, M, N, G, g, stride_y, stride_x,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_M, BLOCK_N]`` of y. PRECISION: "fma" or an ``input_precision`` of ``tl.dot``.

    EARLY: launched while the kernel before it, which writes y, may still run; it waits for that before it reads y.
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if PRECISION == "fma":  # added up over groups at the end: a sum across threads costs barriers
        total = tl.zeros((BLOCK_M, BLOCK_G, BLOCK_N), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, G, BLOCK_G):
        groups = first + tl.arange(0, BLOCK_G)
        pooled = _pool_tile(x_ptr, stride_x, rows, groups, M, G, g, BLOCK_M, BLOCK_G, BLOCK_I)
        inside = (groups < G)[:, None] & (columns < N)[None, :]
        offsets = tl.load(offsets_ptr + groups[:, None] * N + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if PRECISION == "fma":
            total += pooled[:, :, None] * offsets[None, :, :]
        else:
            total = tl.dot(pooled, offsets, total, input_precision=PRECISION)
    if PRECISION == "fma":
        total = tl.sum(total, axis=1)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    place = y_ptr + rows.to(tl.int64)[:, None] * stride_y + columns[None, :]
    if EARLY:
        tl.extra.cuda.gdc_wait()
    y = tl.load(place, mask=inside, other=0.0)
    tl.store(place, (y.to(tl.float32) + total).to(y.dtype), mask=inside)


@triton.jit(do_not_specialize=["M"])
def pool_kernel(
    pooled_ptr, x_ptr, M, G, g, stride_x, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_I: tl.constexpr
):
    """One tile ``[BLOCK_M, BLOCK_G]`` of P(x)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    groups = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    pooled = _pool_tile(x_ptr, stride_x, rows, groups, M, G, g, BLOCK_M, BLOCK_G, BLOCK_I)
    inside = (rows < M)[:, None] & (groups < G)[None, :]
    tl.store(pooled_ptr + rows.to(tl.int64)[:, None] * G + groups[None, :], pooled, mask=inside)


def pool(x: Tensor, groups: int) -> Tensor:
    """``P(x)``: ``[M, K] → [M, G]`` in float32."""
    m, k = x.shape
    pooled = torch.empty(m, groups, dtype=torch.float32, device=x.device)
    blocks = pool_blocks(k // groups)
    grid = (triton.cdiv(m, blocks["BLOCK_M"]), triton.cdiv(groups, blocks["BLOCK_G"]))
    pool_kernel[grid](pooled, x, m, groups, k // groups, x.stride(0), **blocks)
    return pooled


def add_offsets(y: Tensor, x: Tensor, offsets: Tensor, early: bool = False) -> None:
    """``y += P(x)·offsets`` in place.

    Args:
        y: ``[M, N]``, x: ``[M, K]``, rows of contiguous elements, any row stride. offsets: ``[G, N]``, contiguous.
    """
    (m, n), groups = y.shape, offsets.shape[0]
    if m == 0:
        return
    exact = torch.float32 in (x.dtype, offsets.dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    # Triton 3.6 does not compile pooling of float32 together with tf32x3.
    if m > (_FMA_ROWS if x.dtype == torch.float32 else ONE_KERNEL_ROWS):
        x, blocks = pool(x, groups), blocks_of_pooled(exact)
    else:
        blocks = blocks_of_few(m, x.shape[1] // groups, exact)
    grid = (triton.cdiv(n, blocks["BLOCK_N"]), triton.cdiv(m, blocks["BLOCK_M"]))
    add_kernel[grid](
        y,
        x,
        offsets,
        m,
        n,
        groups,
        x.shape[1] // groups,
        y.stride(0),
        x.stride(0),
        **blocks,
        EARLY=early,
        launch_pdl=early,
    )


def pool_blocks(group_size: int) -> dict[str, int]:
    """Constants of ``pool_kernel``."""
    m, g = 4, 16
    return {"BLOCK_M": m, "BLOCK_G": g, "BLOCK_I": _columns_a_step(group_size, m * g)}


def blocks_of_few(rows: int, group_size: int, exact: bool) -> dict[str, int | str]:
    """Constants of ``add_kernel`` that pools x itself. exact: x or the offsets are float32."""
    m = triton.next_power_of_2(rows) if rows <= _FMA_ROWS else 16
    g = _groups_a_step(group_size, m)
    i = _columns_a_step(group_size, m * g)
    precision = "fma" if m <= _FMA_ROWS else _dot_precision(exact)
    return {"BLOCK_M": m, "BLOCK_N": 64, "BLOCK_G": g, "BLOCK_I": i, "PRECISION": precision}


def blocks_of_pooled(exact: bool) -> dict[str, int | str]:
    """Constants of ``add_kernel`` on pooled rows: groups of one column."""
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_G": 32, "BLOCK_I": 1, "PRECISION": _dot_precision(exact)}


def _dot_precision(exact: bool) -> str:
    return "tf32x3" if exact else "tf32"


def _groups_a_step(group_size: int, rows: int) -> int:
    """How many groups a program pools at once. Each step waits for memory: few, large ones, within the registers."""
    return max(16, min(64, _POOL_TILE // 2 // triton.next_power_of_2(group_size)) // rows)


def _columns_a_step(group_size: int, sums: int) -> int:
    """How many columns of a group a program adds at once: a power of two, for ``sums`` sums side by side."""
    return min(triton.next_power_of_2(group_size), max(1, _POOL_TILE // sums))
