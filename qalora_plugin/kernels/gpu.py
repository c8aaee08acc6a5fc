"""Triton kernels for CUDA: the effective weight into the scratch, and a matmul that skips the scratch for few tokens.

    fill     out[k,n] = scales[γ,n]·(q[k,n] − zeros[γ,n]) + offsets[γ,n]          then cuBLAS multiplies
    matmul   y = x·(the same, tile by tile), for T ≤ 64

``fill`` writes four times the bytes that it reads and cuBLAS reads them again: nothing at thousands of tokens, all the
time at a handful (evaluation, generation during training). Both are bound by memory: lanes run along N, where words,
scales and weights lie side by side; a program stays inside one group and reads scale, zero and offset once a column.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench

from ..quant.words import codes_per_period, words_per_period, zero_shift
from .packed import PackedWeight

MAX_TOKENS = 64  # of matmul: beyond, tensor cores are busy enough for the scratch to pay
MATMUL_COLUMNS = 64  # of a program


@triton.jit
def _codes(base, index, stride, mask, BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr):
    """Code ``index`` of a bit stream whose 32-bit words lie ``stride`` apart, starting at ``base`` (layout.py)."""
    bit = index % PERIOD * BITS
    word = index // PERIOD * WORDS + bit // 32
    shift = (bit % 32).to(tl.uint32)
    low = tl.load(base + word.to(tl.int64) * stride, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if BITS == 3:  # the only width with codes that straddle words
        straddles = shift > 32 - BITS
        high = tl.load(base + (word + 1).to(tl.int64) * stride, mask=mask & straddles, other=0)
        low = tl.where(straddles, low | (high.to(tl.uint32, bitcast=True) << (32 - shift) % 32), low)
    return low & ((1 << BITS) - 1)


@triton.jit
def _zeros(qzeros, group, n, N, zero_shift, mask, BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr):
    """Integer zero-points of columns ``n`` in ``group``; ``zero_shift`` turns stored ones into true ones."""
    row = qzeros + group.to(tl.int64) * (N // PERIOD * WORDS)
    if BITS == 3:  # per field, modulo 8
        return (_codes(row, n, 1, mask, BITS, PERIOD, WORDS) + zero_shift) & 7
    word = tl.load(row + n // PERIOD, mask=mask, other=0).to(tl.uint32, bitcast=True) + zero_shift
    return (word >> (n % PERIOD * BITS).to(tl.uint32)) & ((1 << BITS) - 1)


@triton.jit
def _weights(
    qweight, qzeros, scales, offsets, group, k, n, N, zero_shift, mask_n, mask,
    HAS_OFFSETS: tl.constexpr, BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Effective weights in float32. ``group`` and ``k`` broadcast against ``n`` and its masks."""
    at = group.to(tl.int64) * N + n
    code = _codes(qweight + n, k, N, mask, BITS, PERIOD, WORDS).to(tl.float32)
    zero = _zeros(qzeros, group, n, N, zero_shift, mask_n, BITS, PERIOD, WORDS).to(tl.float32)
    weight = (code - zero) * tl.load(scales + at, mask=mask_n, other=0).to(tl.float32)
    if HAS_OFFSETS:
        weight += tl.load(offsets + at, mask=mask_n, other=0)
    return weight


@triton.jit
def fill_kernel(
    qweight, qzeros, scales, offsets, g_idx, out, K, N, group_size, zero_shift,
    HAS_OFFSETS: tl.constexpr, ACT_ORDER: tl.constexpr, BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``ROWS × COLUMNS`` weights a program; the rows are in one group, or anywhere with ``ACT_ORDER``."""
    n = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    if ACT_ORDER:
        k = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
        mask_k = k < K
        group = tl.load(g_idx + k, mask=mask_k, other=0)
        mask_n = mask_k & (n < N)
    else:
        parts = tl.cdiv(group_size, ROWS)
        group = tl.program_id(0) // parts
        row = (tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS))[:, None]
        k = group * group_size + row
        mask_k = row < group_size
        mask_n = n < N
    mask = mask_k & (n < N)
    weight = _weights(
        qweight, qzeros, scales, offsets, group, k, n, N, zero_shift, mask_n, mask, HAS_OFFSETS, BITS, PERIOD, WORDS
    )
    tl.store(out + k.to(tl.int64) * N + n, weight.to(out.dtype.element_ty), mask=mask)


@triton.jit
def matmul_kernel(
    x, qweight, qzeros, scales, offsets, partial, T, K, N, group_size, zero_shift, groups_each,
    HAS_OFFSETS: tl.constexpr, BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A strip of columns times ``groups_each`` groups → ``partial[program_id(1)]`` float32 ``[T, N]``."""
    n = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    t = tl.arange(0, TOKENS)[:, None]
    mask_n, mask_t = n < N, t < T
    sums = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    first = tl.program_id(1) * groups_each
    for group in range(first, tl.minimum(first + groups_each, K // group_size)):
        for start in range(0, group_size, ROWS):
            row = start + tl.arange(0, ROWS)
            k, inside = group * group_size + row, row < group_size
            weight = _weights(
                qweight, qzeros, scales, offsets, (group + row * 0)[:, None], k[:, None], n, N, zero_shift, mask_n,
                inside[:, None] & mask_n, HAS_OFFSETS, BITS, PERIOD, WORDS,
            )  # fmt: skip
            tile = tl.load(x + t * K + k[None, :], mask=mask_t & inside[None, :], other=0)
            sums = tl.dot(tile, weight.to(x.dtype.element_ty), sums, input_precision="ieee")
    tl.store(partial + tl.program_id(1) * T * N + t * N + n, sums, mask=mask_t & mask_n)


FILL_CONFIGS = [
    triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps)
    for rows, columns, warps in ((16, 128, 4), (32, 64, 4), (32, 128, 4), (32, 128, 8), (32, 256, 8), (64, 128, 8))
]
_tuned_fill = triton.autotune(FILL_CONFIGS, key=["K", "N", "group_size"])(fill_kernel)


def fill(packed: PackedWeight, offsets: Tensor | None, out: Tensor) -> None:
    """Write the dense weight, plus ``offsets`` [G, N] instead of the packed ones, to ``out`` ``[K, N]``."""
    launch_fill(_tuned_fill, packed, offsets, out)


def launch_fill(kernel, packed: PackedWeight, offsets: Tensor | None, out: Tensor, **config: int) -> None:
    """Run ``kernel``: the tuned one, or ``fill_kernel`` with its ``ROWS`` and ``COLUMNS`` given."""
    act_order = packed.g_idx is not None

    def grid(meta: dict) -> tuple[int, int]:
        parts = triton.cdiv(packed.in_features if act_order else packed.group_size, meta["ROWS"])
        return parts * (1 if act_order else packed.groups), triton.cdiv(packed.out_features, meta["COLUMNS"])

    g_idx = packed.g_idx if act_order else packed.qweight  # not read
    with torch.cuda.device_of(out):  # Triton launches on the current device, whichever its tensors are on
        kernel[grid](
            packed.qweight, packed.qzeros, packed.scales, _float(offsets, packed), g_idx, out,
            packed.in_features, packed.out_features, packed.group_size, _shift(packed),
            HAS_OFFSETS=offsets is not None, ACT_ORDER=act_order, **layout_constants(packed.bits), **config,
        )  # fmt: skip


def takes_matmul(x: Tensor, packed: PackedWeight) -> bool:
    """Whether :func:`matmul` can run: few tokens, on CUDA, groups in order and wide enough for a tensor core."""
    return 0 < x[..., 0].numel() <= MAX_TOKENS and packed.g_idx is None and packed.group_size >= 16


def matmul(x: Tensor, packed: PackedWeight, offsets: Tensor | None) -> Tensor:
    """``x·w`` with ``offsets`` [G, N] instead of the packed ones: ``[..., K] → [..., N]``, at most 64 tokens.

    The groups are split over programs until the GPU is full; their float32 sums are then added in a fixed order.
    """
    flat = x.reshape(-1, packed.in_features).contiguous()
    tokens, n = len(flat), packed.out_features
    strips = triton.cdiv(n, MATMUL_COLUMNS)
    parts = max(1, min(packed.groups, triton.cdiv(2 * _processors(x.device), strips)))
    each = triton.cdiv(packed.groups, parts)
    partial = flat.new_empty(triton.cdiv(packed.groups, each), tokens, n, dtype=torch.float32)
    with torch.cuda.device_of(x):
        matmul_kernel[(strips, len(partial))](
            flat, packed.qweight, packed.qzeros, packed.scales, _float(offsets, packed), partial,
            tokens, packed.in_features, n, packed.group_size, _shift(packed), each,
            HAS_OFFSETS=offsets is not None, **layout_constants(packed.bits),
            TOKENS=max(16, triton.next_power_of_2(tokens)),
            ROWS=32 if packed.group_size >= 32 else 16,
            COLUMNS=MATMUL_COLUMNS,
        )  # fmt: skip
    return partial.sum(0).to(x.dtype).view(*x.shape[:-1], n)


_wins: dict[tuple, bool] = {}


def matmul_wins(x: Tensor, packed: PackedWeight) -> bool:
    """Whether :func:`matmul` beats :func:`fill` and cuBLAS on this GPU: timed once a shape and power of 2 of tokens."""
    tokens = triton.next_power_of_2(x[..., 0].numel())
    key = (x.device, x.dtype, tokens, packed.in_features, packed.out_features, packed.group_size, packed.bits)
    if key not in _wins:
        if torch.cuda.is_current_stream_capturing():
            return False  # nothing can be timed inside a CUDA graph
        trial = x.new_ones(tokens, packed.in_features)
        out = x.new_empty(packed.in_features, packed.out_features)
        with torch.cuda.device_of(x):
            fused = do_bench(lambda: matmul(trial, packed, packed.offsets))
            _wins[key] = fused < do_bench(lambda: (fill(packed, packed.offsets, out), trial @ out))
    return _wins[key]


def layout_constants(bits: int) -> dict[str, int]:
    """Of the bit streams, as the kernels take them."""
    return {"BITS": bits, "PERIOD": codes_per_period(bits), "WORDS": words_per_period(bits)}


def _shift(packed: PackedWeight) -> int:
    """Kernel argument ``zero_shift``; at 3 bits it is added to fields instead of words."""
    shift = zero_shift(packed.bits, packed.checkpoint_format)
    return shift if packed.bits != 3 else int(shift != 0)


def _float(offsets: Tensor | None, packed: PackedWeight) -> Tensor:
    """float32 offsets; a stand-in, never read, where there are none."""
    return packed.scales if offsets is None else offsets.float().contiguous()


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
