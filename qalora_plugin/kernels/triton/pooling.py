"""``P(x)`` on CUDA: x summed over each quantization group, in one pass at the memory's speed.

The group's columns lie side by side, so x ``[T, G·g]`` is a list of T·G rows of g numbers, and a program sums some of
these rows. (A sum by torch over the same view takes ten times as long at g = 32.)
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048  # numbers that a program holds at once
_WIDEST = 1024  # of a group, at once


@triton.jit(do_not_specialize=["rows"])
def pool_kernel(x, pooled, rows, groups, g, stride, divisor, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``ROWS`` sums, ``COLUMNS`` numbers of each at a time; float32, rounded once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    place = x + (row // groups * stride + row % groups * g)[:, None]
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, g, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        part = tl.load(place + column, mask=inside[:, None] & (column < g), other=0)
        sums += tl.sum(part.to(tl.float32), axis=1)
    tl.store(pooled + row, (sums / divisor).to(pooled.dtype.element_ty), mask=inside)


def pool(x: Tensor, groups: int, dtype: torch.dtype, divisor: int = 1) -> Tensor:
    """``P(x) / divisor``, ``[..., K] → [..., G]`` in ``dtype``; x is contiguous, or ``[T, K]`` with any row stride."""
    pooled = x.new_empty(*x.shape[:-1], groups, dtype=dtype)
    g, rows = x.shape[-1] // groups, pooled.numel()
    blocks = pool_blocks(g)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever its tensors are on
        pool_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
            x, pooled, rows, groups, g, x.stride(-2), float(divisor), **blocks
        )
    return pooled


@cache
def pool_blocks(group_size: int) -> dict[str, int]:
    """Constants of :func:`pool_kernel`."""
    columns = min(triton.next_power_of_2(group_size), _WIDEST)
    return {"ROWS": _TILE // columns, "COLUMNS": columns}
