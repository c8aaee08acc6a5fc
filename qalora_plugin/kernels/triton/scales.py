"""The gradient of trained scales on CUDA: ``xᵀ·dy`` summed up along the codes while it is in registers.

    dM[γ,n] = Σ_{k∈γ} w[k,n] · Σ_t x[t,k]·dy[t,n]          w = scales·(q − zeros)

A program makes a tile of ``xᵀ·dy`` on tensor cores, unpacks the weights of that tile, multiplies, and adds up the rows
of each group: neither ``xᵀ·dy`` nor a weight goes to memory. What a group has beyond the tile other programs sum, and
torch adds their parts, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels.triton.dequantize import layout_constants
from qalora_plugin.kernels.triton.grouped import Tiles, ends_of, tensors_of
from qalora_plugin.kernels.triton.grouped_kernels import slots_of, weights_of

ROWS, COLUMNS, WARPS = 128, 128, 8  # of a tile: large ones, for what limits this is how often x and dy are read
TOKEN_BYTES = 128  # of a column in a step: more would outgrow the shared memory of consumer GPUs


@triton.jit(do_not_specialize=["count"])
def factor_gradient_kernel(
    x, dy, out, slots, ends, qweight, zeros, scales, offsets, g_idx, count, K, N, group_size, STACKED: tl.constexpr,
    BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr,
    TOKENS: tl.constexpr, PERIODS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """``[PERIODS·PERIOD/PART, COLUMNS]`` sums of ``PART`` rows each, of the expert ``program_id(2)``.

    STACKED: tokens are the slots of this expert, the last of which is ``ends[expert] - 1``; else all ``count`` of them.
    """
    expert = tl.program_id(2)
    first = tl.program_id(0) * PERIODS
    k = first * PERIOD + tl.arange(0, PERIODS * PERIOD)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0) if STACKED else 0
    end = tl.load(ends + expert) if STACKED else count
    total = tl.zeros((PERIODS * PERIOD, COLUMNS), dtype=tl.float32)
    for at in range(start, end, TOKENS):
        if STACKED:
            token, there = slots_of(slots, at, count, TOKENS)
        else:
            token = (at + tl.arange(0, TOKENS)).to(tl.int64)
            there = token < count
        left = tl.load(x + (token * K)[:, None] + k[None, :], mask=there[:, None] & (k < K)[None, :], other=0)
        right = tl.load(dy + (token * N)[:, None] + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    weight = weights_of(
        qweight, zeros, scales, offsets, g_idx, expert, first, n, K, N, group_size,
        False, True, False, BITS, PERIOD, WORDS, PERIODS, COLUMNS,
    )  # fmt: skip
    sums = tl.sum(tl.reshape(total * weight, (PERIODS * PERIOD // PART, PART, COLUMNS)), axis=1)
    part = first * PERIOD // PART + tl.arange(0, PERIODS * PERIOD // PART)
    place = out + (expert.to(tl.int64) * (K // PART) + part)[:, None] * N + n[None, :]
    tl.store(place, sums, mask=(part < K // PART)[:, None] & (n < N)[None, :])


def factor_gradient(x: Tensor, dy: Tensor, weight: GroupwiseWeight, tiles: Tiles | None = None) -> Tensor:
    """``dM`` ``[G, N]``, float32.

    Args:
        x: ``[T, K]``. dy: ``[T, N]``. weight: its groups are columns in order, of whole periods; offsets do not count.
        tiles: which rows each expert has, of a weight that is stacked: ``[E, G, N]`` then.
    """
    groups, n, k = weight.groups, weight.out_features, weight.in_features
    part = part_of(weight.group_size)
    stacked, experts = tiles is not None, len(weight.scales) if tiles is not None else 1
    out = x.new_empty(experts, k // part, n, dtype=torch.float32)
    slots, ends = (x, x) if tiles is None else (tiles.slots, ends_of(tiles, experts))
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever its tensors are on
        factor_gradient_kernel[(triton.cdiv(k, ROWS), triton.cdiv(n, COLUMNS), experts)](
            x.contiguous(), dy.contiguous(), out, slots, ends, *tensors_of(weight, None), len(x), k, n,
            weight.group_size, STACKED=stacked, TOKENS=tokens_of(x.element_size(), tiles),
            **constants(weight.bits, weight.group_size), num_warps=WARPS,
        )  # fmt: skip
    out = out.unflatten(1, (groups, -1)).sum(2) if part < weight.group_size else out
    return out if stacked else out[0]


def constants(bits: int, group_size: int) -> dict[str, int]:
    """Of the kernel, but those of its tokens."""
    blocks = {"PERIODS": ROWS // codes_per_period(bits), "COLUMNS": COLUMNS, "PART": part_of(group_size)}
    return layout_constants(bits) | blocks


def tokens_of(itemsize: int, tiles: Tiles | None = None) -> int:
    """Of a step, of so many bytes a number; a tile of :class:`Tiles` is several steps, or one."""
    most = TOKEN_BYTES // itemsize
    return most if tiles is None else min(tiles.block, most)


def part_of(group_size: int) -> int:
    """Rows of a group that one program sums: a power of two that divides it, within a tile."""
    return min(group_size & -group_size, ROWS)
