"""Triton kernels for stacked experts: what a tile of slots, all of one expert, is multiplied by.

    multiply     y[s] = x[s]·w'_e                          w'_e = scales·(q − zeros) + offsets, tile by tile
    multiply_t   dx[s] = dy[s]·w'_eᵀ
    product      y[s] = x[s]·m_e                           m dense: the factors of adapters
    outer        dm_e = Σ_s x[s]ᵀ·dy[s]                    over the slots s of expert e
    pool         P_e(x[s])                                 in act-order, where groups are every expert's own

Weights are unpacked in registers as in :mod:`.dequantize`: a word's codes along K lie in one column, so a tile
``[periods, columns]`` of words becomes ``[periods·codes, columns]`` weights by a broadcast and a reshape, and offsets
cost a load a group. Which slots a tile has: :class:`~.grouped.Tiles`.
"""

import triton
import triton.language as tl

from qalora_plugin.kernels.triton.dequantize import group_terms, load_period


@triton.jit
def slots_of(slots, first, count, ROWS: tl.constexpr):
    """The ``ROWS`` slots of a tile, and which of them are no filling."""
    slot = tl.load(slots + first + tl.arange(0, ROWS)).to(tl.int64)
    return slot, slot < count


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
def weights_of(
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
    words = load_period(qweight, period[:, None], n[None, :], N, inside, WORDS)
    code = _codes(words[0], words[1], words[2], BITS, PERIOD)
    if ALIGNED:
        group = (period * PERIOD // group_size)[:, None]
        scale, shift = group_terms(
            zeros + each, scales + each, offsets + each, group, n[None, :], N, inside, HAS_OFFSETS
        )
        weight = code * scale[:, None, :] + shift[:, None, :]
    else:
        k = period[:, None] * PERIOD + tl.arange(0, PERIOD)[None, :]
        group = tl.load(g_idx + expert * K + k, mask=k < K, other=0) if ACT_ORDER else k // group_size
        there = (k < K)[:, :, None] & (n < N)[None, None, :]
        scale, shift = group_terms(
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
    slot, there = slots_of(slots, tile * ROWS, count, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = x + (slot // per_row * K)[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, K // PERIOD, PERIODS):
        weight = weights_of(
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
    slot, there = slots_of(slots, tile * ROWS, count, ROWS)
    first = tl.program_id(1) * PERIODS
    total = tl.zeros((ROWS, PERIODS * PERIOD), dtype=tl.float32)
    for start in range(0, N, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        weight = weights_of(
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
    slot, there = slots_of(slots, tile * ROWS, count, ROWS)
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
        slot, there = slots_of(slots, first, count, ROWS)
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
    slot, there = slots_of(slots, tile * ROWS, count, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    total = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
    for i in range(g):
        column = tl.load(order + group * g + i, mask=group < groups, other=0)
        mask = there[:, None] & (group < groups)[None, :]
        total += tl.load(x + (slot // per_row * K)[:, None] + column[None, :], mask=mask, other=0).to(tl.float32)
    place = out + (slot * groups)[:, None] + group[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=there[:, None] & (group < groups)[None, :])
