"""Triton kernels for stacked experts on CUDA: every token by the packed weights of its expert, in one launch.

    multiply     y[s] = x[s]·w'_e                          w'_e = scales·(q − zeros) + offsets, tile by tile
    multiply_t   dx[s] = dy[s]·w'_eᵀ
    product      y[s] = x[s]·m_e                           m dense: the factors of adapters
    outer        dm_e = Σ_s x[s]ᵀ·dy[s]                    over the slots s of expert e
    pool         P_e(x[s])                                 in act-order, where groups are every expert's own

A *slot* is one of the k choices of a token, ``s = token·k + choice``. Kernels read and write in the order of slots and
are told by :class:`Tiles` which ones an expert has, so nothing is sorted or copied and no count goes to the CPU: a CUDA
graph holds it all. Weights are unpacked in registers as in :mod:`.dequantize`: a word's codes along K lie in one
column, so a tile ``[periods, columns]`` of words becomes ``[periods·codes, columns]`` weights by a broadcast and a
reshape, and offsets cost a load a group.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels.triton.dequantize import _group_terms, _load_period, layout_constants

FEWEST, MOST = 16, 128  # rows of a tile: what tensor cores take, and what registers hold
COLUMNS, DEPTH = 64, 64  # of a tile: outputs, and what is summed over in a step
GROUPS_OF_POOL = 32


class Tiles(NamedTuple):
    """Slots by expert, those of each filled up to whole tiles. (What vLLM's ``moe_align_block_size`` finds.)

    Attributes:
        slots: int32 ``[tiles·block]``, S where a tile is filled up.
        experts: int32 ``[tiles]``, whose each tile is.
        used: int32 ``[1]``: ``slots`` that count; tiles beyond are empty.
        block: rows of a tile. size: S, of all slots.
    """

    slots: Tensor
    experts: Tensor
    used: Tensor
    block: int
    size: int

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Tiles":
        """chosen: ``[T, k]``, an expert each. Nothing here waits for the GPU."""
        flat = chosen.flatten()
        count, block = len(flat), block_of(len(flat), experts)
        tiles = count // block + min(experts, count)  # no fewer than there can be
        sizes = torch.zeros(experts, dtype=torch.int64, device=flat.device)
        sizes.scatter_add_(0, flat, torch.ones_like(flat))
        ends = ((sizes + block - 1) // block).cumsum(0)  # in tiles
        order = flat.argsort(stable=True)
        of_expert = flat[order]
        before = sizes.cumsum(0) - sizes
        starts = (ends - (sizes + block - 1) // block) * block
        place = torch.arange(count, device=flat.device) - before[of_expert] + starts[of_expert]
        slots = flat.new_full((tiles * block,), count, dtype=torch.int32)
        slots[place] = order.to(torch.int32)
        owners = torch.searchsorted(ends, torch.arange(tiles, device=flat.device), right=True)
        owners = owners.clamp_(max=experts - 1).to(torch.int32)
        return cls(slots, owners, (ends[-1:] * block).to(torch.int32), block, count)

    def owners(self) -> Tensor:
        """int32 ``[S]``: each slot's expert."""
        found = self.experts.new_empty(self.size + 1)
        return found.scatter_(0, self.slots.long(), self.experts.repeat_interleave(self.block))[:-1]


def block_of(slots: int, experts: int) -> int:
    """Rows of a tile: about what an expert has if all have alike."""
    return min(MOST, max(FEWEST, triton.next_power_of_2(slots // experts)))


@triton.jit
def _codes(words_0, words_1, words_2, BITS: tl.constexpr, PERIOD: tl.constexpr):
    """All codes ``[P, PERIOD, n]`` of words ``[P, n]``, as float32; of three only the first counts but at 3 bits."""
    bit = (tl.arange(0, PERIOD) * BITS)[None, :, None]
    shift = (bit % 32).to(tl.uint32)
    if BITS == 3:
        word = bit // 32
        low = tl.where(word == 0, words_0[:, None, :], tl.where(word == 1, words_1[:, None, :], words_2[:, None, :]))
        high = tl.where(word == 0, words_1[:, None, :], words_2[:, None, :])
        code = low >> shift
        code |= tl.where(shift + BITS > 32, high << ((32 - shift) % 32), 0)  # codes 10 and 21 straddle two words
    else:
        code = words_0[:, None, :] >> shift
    return (code & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _weights(
    qweight, zeros, scales, offsets, g_idx, expert, first, n, K, N, group_size,
    HAS_OFFSETS: tl.constexpr, ALIGNED: tl.constexpr, ACT_ORDER: tl.constexpr,
    BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr, PERIODS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``w'_e`` in the ``PERIODS`` periods from ``first`` on and the columns n, ``[PERIODS·PERIOD, COLUMNS]``, float32;
    0 beyond K and N."""
    expert = expert.to(tl.int64)
    qweight += expert * (K // PERIOD * WORDS) * N
    each = expert * (K // group_size) * N
    period = first + tl.arange(0, PERIODS)
    inside = (period < K // PERIOD)[:, None] & (n < N)[None, :]
    words = _load_period(qweight, period[:, None], n[None, :], N, inside, WORDS)
    code = _codes(words[0], words[1], words[2], BITS, PERIOD)
    if ALIGNED:
        group = (period * PERIOD // group_size)[:, None]
        scale, shift = _group_terms(
            zeros + each, scales + each, offsets + each, group, n[None, :], N, inside, HAS_OFFSETS
        )
        weight = code * scale[:, None, :] + shift[:, None, :]
    else:
        k = period[:, None] * PERIOD + tl.arange(0, PERIOD)[None, :]
        group = tl.load(g_idx + expert * K + k, mask=k < K, other=0) if ACT_ORDER else k // group_size
        there = (k < K)[:, :, None] & (n < N)[None, None, :]
        scale, shift = _group_terms(
            zeros + each, scales + each, offsets + each, group[:, :, None], n[None, None, :], N, there, HAS_OFFSETS
        )
        weight = code * scale + shift
    return tl.reshape(weight, (PERIODS * PERIOD, COLUMNS))


@triton.jit(do_not_specialize=["count"])
def multiply_kernel(
    x, out, slots, experts, used, qweight, zeros, scales, offsets, g_idx, count, per_row, K, N, group_size,
    HAS_OFFSETS: tl.constexpr, ALIGNED: tl.constexpr, ACT_ORDER: tl.constexpr,
    BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, PERIODS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile ``[ROWS, COLUMNS]`` of y; row ``slot // per_row`` of x is the slot's."""
    tile = tl.program_id(0)
    if tile * ROWS >= tl.load(used):
        return
    expert = tl.load(experts + tile)
    slot = tl.load(slots + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = slot < count
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = x + (slot // per_row * K)[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, K // PERIOD, PERIODS):
        weight = _weights(
            qweight, zeros, scales, offsets, g_idx, expert, first, n, K, N, group_size,
            HAS_OFFSETS, ALIGNED, ACT_ORDER, BITS, PERIOD, WORDS, PERIODS, COLUMNS,
        )  # fmt: skip
        k = first * PERIOD + tl.arange(0, PERIODS * PERIOD)
        part = tl.load(row + k[None, :], mask=there[:, None] & (k < K)[None, :], other=0)
        total = tl.dot(part, weight.to(part.dtype), total, input_precision="ieee")
    place = out + (slot * N)[:, None] + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=there[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["count"])
def multiply_t_kernel(
    dy, out, slots, experts, used, qweight, zeros, scales, offsets, g_idx, count, K, N, group_size,
    HAS_OFFSETS: tl.constexpr, ALIGNED: tl.constexpr, ACT_ORDER: tl.constexpr,
    BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, PERIODS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile ``[ROWS, PERIODS·PERIOD]`` of dx, a row a slot."""
    tile = tl.program_id(0)
    if tile * ROWS >= tl.load(used):
        return
    expert = tl.load(experts + tile)
    slot = tl.load(slots + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = slot < count
    first = tl.program_id(1) * PERIODS
    total = tl.zeros((ROWS, PERIODS * PERIOD), dtype=tl.float32)
    for start in range(0, N, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        weight = _weights(
            qweight, zeros, scales, offsets, g_idx, expert, first, n, K, N, group_size,
            HAS_OFFSETS, ALIGNED, ACT_ORDER, BITS, PERIOD, WORDS, PERIODS, COLUMNS,
        )  # fmt: skip
        part = tl.load(dy + (slot * N)[:, None] + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0)
        total = tl.dot(part, tl.trans(weight).to(part.dtype), total, input_precision="ieee")
    k = first * PERIOD + tl.arange(0, PERIODS * PERIOD)
    tl.store(out + (slot * K)[:, None] + k[None, :], total.to(out.dtype.element_ty), mask=there[:, None] & (k < K))


@triton.jit(do_not_specialize=["count"])
def product_kernel(
    x, m, out, slots, experts, used, count, per_row, INNER, N, stride_e, stride_i, stride_n,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile ``[ROWS, COLUMNS]`` of ``x·m_e``; the strides are of m ``[E, INNER, N]``."""
    tile = tl.program_id(0)
    if tile * ROWS >= tl.load(used):
        return
    m += tl.load(experts + tile).to(tl.int64) * stride_e
    slot = tl.load(slots + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = slot < count
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, INNER, DEPTH):
        i = first + tl.arange(0, DEPTH)
        part = tl.load(
            x + (slot // per_row * INNER)[:, None] + i[None, :], mask=there[:, None] & (i < INNER)[None, :], other=0
        )
        inside = (i < INNER)[:, None] & (n < N)[None, :]
        factor = tl.load(m + i[:, None] * stride_i + n[None, :] * stride_n, mask=inside, other=0)
        total = tl.dot(part, factor.to(part.dtype), total, input_precision="ieee")
    place = out + (slot * N)[:, None] + n[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=there[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["count"])
def outer_kernel(
    x, dy, out, slots, ends, count, per_row, INNER, N,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile ``[DEPTH, COLUMNS]`` of one expert's dm, float32; ``ends``: in ``slots``, of every expert's."""
    expert = tl.program_id(0)
    i = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    n = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((DEPTH, COLUMNS), dtype=tl.float32)
    for first in range(start, tl.load(ends + expert), ROWS):
        slot = tl.load(slots + first + tl.arange(0, ROWS)).to(tl.int64)
        there = slot < count
        left = tl.load(
            x + (slot // per_row * INNER)[:, None] + i[None, :], mask=there[:, None] & (i < INNER)[None, :], other=0
        )
        right = tl.load(dy + (slot * N)[:, None] + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    place = out + (expert.to(tl.int64) * INNER + i)[:, None] * N + n[None, :]
    tl.store(place, total, mask=(i < INNER)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["count"])
def pool_kernel(
    x, out, slots, experts, used, order, count, per_row, K, groups, g, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """``GROUPS`` sums of ``ROWS`` slots; ``order`` ``[E, K]``: an expert's columns, sorted by its groups."""
    tile = tl.program_id(0)
    if tile * ROWS >= tl.load(used):
        return
    order += tl.load(experts + tile).to(tl.int64) * K
    slot = tl.load(slots + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = slot < count
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    total = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
    for i in range(g):
        column = tl.load(order + group * g + i, mask=group < groups, other=0)
        mask = there[:, None] & (group < groups)[None, :]
        total += tl.load(x + (slot // per_row * K)[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    place = out + (slot * groups)[:, None] + group[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=there[:, None] & (group < groups)[None, :])


def multiply(x: Tensor, weight: GroupwiseWeight, offsets: Tensor | None, tiles: Tiles) -> Tensor:
    """``[S, N]``, each slot's row of x by its expert's weight, with ``offsets`` ``[E, G, N]`` instead of its own.

    Args:
        x: ``[T, K]``, a row for each token, or ``[S, K]``.
    """
    n = weight.out_features
    out = x.new_empty(tiles.size, n)
    blocks = weight_blocks(weight)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever its tensors are on
        multiply_kernel[(len(tiles.experts), triton.cdiv(n, COLUMNS))](
            x.contiguous(), out, *tiles[:3], *_tensors(weight, offsets), tiles.size, _per_row(x, tiles),
            weight.in_features, n, weight.group_size,
            HAS_OFFSETS=offsets is not None, **blocks, **rows(tiles),
        )  # fmt: skip
    return out


def multiply_t(dy: Tensor, weight: GroupwiseWeight, offsets: Tensor | None, tiles: Tiles) -> Tensor:
    """``dy·w'ᵀ``, ``[S, N] → [S, K]``."""
    k = weight.in_features
    out = dy.new_empty(tiles.size, k)
    blocks = weight_blocks(weight)
    with torch.cuda.device_of(dy):
        multiply_t_kernel[(len(tiles.experts), triton.cdiv(k, blocks["PERIODS"] * blocks["PERIOD"]))](
            dy.contiguous(), out, *tiles[:3], *_tensors(weight, offsets), tiles.size, k, weight.out_features,
            weight.group_size, HAS_OFFSETS=offsets is not None, **blocks, **rows(tiles),
        )  # fmt: skip
    return out


def product(x: Tensor, m: Tensor, tiles: Tiles) -> Tensor:
    """``[S, N]``, each slot's row of x ``[T or S, I]`` times its expert's ``m`` ``[E, I, N]``, of any strides."""
    inner, n = m.shape[1:]
    out = x.new_empty(tiles.size, n)
    with torch.cuda.device_of(x):
        product_kernel[(len(tiles.experts), triton.cdiv(n, COLUMNS))](
            x.contiguous(), m, out, *tiles[:3], tiles.size, _per_row(x, tiles), inner, n, *m.stride(),
            DEPTH=_wide(inner), COLUMNS=COLUMNS, **rows(tiles),
        )  # fmt: skip
    return out


def outer(x: Tensor, dy: Tensor, experts: int, tiles: Tiles) -> Tensor:
    """``Σ xᵀ·dy`` over each expert's slots: x ``[T or S, I]``, dy ``[S, N]`` → ``[E, I, N]``, float32."""
    inner, n = x.shape[1], dy.shape[1]
    out = x.new_empty(experts, inner, n, dtype=torch.float32)
    mine = torch.arange(len(tiles.experts), device=x.device) * tiles.block < tiles.used
    ends = torch.zeros(experts, dtype=torch.int64, device=x.device)
    ends.scatter_add_(0, tiles.experts.long(), mine.long() * tiles.block)
    depth = _wide(inner)
    with torch.cuda.device_of(x):
        outer_kernel[(experts, triton.cdiv(inner, depth), triton.cdiv(n, COLUMNS))](
            x.contiguous(), dy.contiguous(), out, tiles.slots, ends.cumsum(0), tiles.size, _per_row(x, tiles),
            inner, n, DEPTH=depth, COLUMNS=COLUMNS, **rows(tiles),
        )  # fmt: skip
    return out


def pool(x: Tensor, weight: GroupwiseWeight, tiles: Tiles) -> Tensor:
    """``P_e(x)`` ``[S, G]`` in act-order, by ``weight.group_order`` ``[E, K]``."""
    groups = weight.groups
    out = x.new_empty(tiles.size, groups)
    with torch.cuda.device_of(x):
        pool_kernel[(len(tiles.experts), triton.cdiv(groups, GROUPS_OF_POOL))](
            x.contiguous(), out, *tiles[:3], weight.group_order, tiles.size, _per_row(x, tiles), weight.in_features,
            groups, weight.group_size, ROWS=tiles.block, GROUPS=GROUPS_OF_POOL,
        )  # fmt: skip
    return out


def rows(tiles: Tiles) -> dict[str, int]:
    """What a launch is told of its tiles."""
    return {"ROWS": tiles.block, "num_warps": warps(tiles.block)}


def warps(block: int) -> int:
    """For a tile of so many rows, within the registers."""
    return 8 if block == MOST else 4


def weight_blocks(weight: GroupwiseWeight) -> dict[str, int]:
    """Constants of the kernels that unpack."""
    period, act_order = codes_per_period(weight.bits), weight.g_idx is not None
    aligned = not act_order and weight.group_size % period == 0
    constants = {"ALIGNED": aligned, "ACT_ORDER": act_order, "PERIODS": DEPTH // period, "COLUMNS": COLUMNS}
    return constants | layout_constants(weight.bits)


def _tensors(weight: GroupwiseWeight, offsets: Tensor | None) -> tuple[Tensor, ...]:
    """Of the weight as kernels take them; stand-ins, never read, for what it does not have."""
    g_idx = weight.qweight if weight.g_idx is None else weight.g_idx
    return weight.qweight, weight.zeros, weight.scales, weight.scales if offsets is None else offsets, g_idx


def _per_row(x: Tensor, tiles: Tiles) -> int:
    """Slots that share a row of x."""
    return tiles.size // len(x) if len(x) else 1


def _wide(inner: int) -> int:
    return min(DEPTH, max(16, triton.next_power_of_2(inner)))
