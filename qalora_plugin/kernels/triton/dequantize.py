"""Triton kernels for CUDA: the effective weight into the scratch, and a matmul that skips the scratch for few tokens.

    fill     out[k,n] = scales[γ,n]·(q[k,n] − zeros[γ,n]) + offsets[γ,n]          then cuBLAS multiplies
    matmul   y = x·(the same, tile by tile), for T ≤ 8

``fill`` writes four times the bytes that it reads and cuBLAS reads them again: nothing at thousands of tokens, all the
time at a handful (generation during training). Both are bound by memory. Lanes run along N, where words, scales and
weights lie side by side. A *period* is the shortest run of whole words: one word of 32/b codes, or three words of 32 at
3 bits. Its words are loaded once and all its codes shifted out of registers, so a weight costs b/8 bytes of loads plus
its share of the group's scale, zero-point and offset.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench

from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.core.words import codes_per_period, words_per_period

MAX_TOKENS = 8  # of matmul, which multiplies without tensor cores
FILL_COLUMNS, FILL_PERIODS, FILL_WARPS = 512, 8, 2  # of a program of fill; fewer periods where a group has fewer
MATMUL_COLUMNS = 64  # of a program


@triton.jit
def load_period(words, period, n, N, mask, WORDS: tl.constexpr):
    """The 32-bit words of ``period`` in the columns ``n``: three, of which only the first counts where WORDS is 1."""
    place = words + (period * WORDS).to(tl.int64) * N + n
    first = tl.load(place, mask=mask, other=0).to(tl.uint32, bitcast=True)
    second, third = first, first
    if WORDS == 3:
        second = tl.load(place + N, mask=mask, other=0).to(tl.uint32, bitcast=True)
        third = tl.load(place + 2 * N, mask=mask, other=0).to(tl.uint32, bitcast=True)
    return first, second, third


@triton.jit
def _code(words, j: tl.constexpr, BITS: tl.constexpr):
    """Code ``j`` of a period, as float32. At 3 bits codes 10 and 21 straddle two words (layout.py)."""
    bit: tl.constexpr = j * BITS % 32
    code = words[j * BITS // 32] >> bit
    if bit + BITS > 32:
        code |= words[j * BITS // 32 + 1] << (32 - bit)
    return (code & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def group_terms(
    zeros, scales, offsets, group, n, N, mask, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    """scale and shift of ``w' = scale·q + shift``, what all columns of K in a group share; float32."""
    at = group.to(tl.int64) * N + n
    scale = tl.load(scales + at, mask=mask, other=0).to(tl.float32)
    shift = -scale * tl.load(zeros + at, mask=mask, other=0).to(tl.float32)
    if HAS_OFFSETS:
        shift += tl.load(offsets + at, mask=mask, other=0)
    return scale, shift


@triton.jit
def fill_kernel(
    qweight, zeros, scales, offsets, g_idx, out, N, group_size,
    HAS_OFFSETS: tl.constexpr, ALIGNED: tl.constexpr, ACT_ORDER: tl.constexpr,
    BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr, PERIODS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``PERIODS·PERIOD × COLUMNS`` weights a program.

    ALIGNED: all its rows are in one group, whose terms it reads once. Else each row finds its own group, by ``g_idx``
    with ACT_ORDER.
    """
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = n < N
    first = tl.program_id(0) * PERIODS
    if ALIGNED:
        group = first * PERIOD // group_size
        scale, shift = group_terms(zeros, scales, offsets, group, n, N, mask, HAS_OFFSETS)
    for period in tl.static_range(PERIODS):
        words = load_period(qweight, first + period, n, N, mask, WORDS)
        for j in tl.static_range(PERIOD):
            k = (first + period) * PERIOD + j
            if not ALIGNED:
                group = tl.load(g_idx + k) if ACT_ORDER else k // group_size
                scale, shift = group_terms(zeros, scales, offsets, group, n, N, mask, HAS_OFFSETS)
            weight = _code(words, j, BITS) * scale + shift
            tl.store(out + k.to(tl.int64) * N + n, weight.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "steps_each"])
def matmul_kernel(
    x, qweight, zeros, scales, offsets, partial, T, K, N, group_size, steps_each,
    HAS_OFFSETS: tl.constexpr, BITS: tl.constexpr, PERIOD: tl.constexpr, WORDS: tl.constexpr,
    TOKENS: tl.constexpr, PERIODS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A strip of columns times ``steps_each`` steps of K → ``partial[program_id(1)]`` float32 ``[T, N]``.

    A step is ``PERIODS`` periods, whose sums stay apart until the end: to add them up takes barriers.
    """
    n = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    t = tl.arange(0, TOKENS)[:, None]
    mask_n = n < N
    sums = tl.zeros((TOKENS, PERIODS, COLUMNS), dtype=tl.float32)
    first = tl.program_id(1) * steps_each
    for step in range(first, tl.minimum(first + steps_each, tl.cdiv(K // PERIOD, PERIODS))):
        row = step * PERIODS + tl.arange(0, PERIODS)
        inside = row < K // PERIOD
        period = row[:, None]
        mask = inside[:, None] & mask_n
        words = load_period(qweight, period, n, N, mask, WORDS)
        scale, shift = group_terms(zeros, scales, offsets, period * PERIOD // group_size, n, N, mask, HAS_OFFSETS)
        for j in tl.static_range(PERIOD):
            weight = _code(words, j, BITS) * scale + shift
            tokens = tl.load(x + t * K + row[None, :] * PERIOD + j, mask=(t < T) & inside[None, :], other=0)
            sums += weight[None, :, :] * tokens.to(tl.float32)[:, :, None]
    place = tl.program_id(1).to(tl.int64) * T * N + t * N + n
    tl.store(partial + place, tl.sum(sums, axis=1), mask=(t < T) & mask_n)


def fill(weight: GroupwiseWeight, offsets: Tensor | None, out: Tensor) -> None:
    """Write the dense weight, plus ``offsets`` [G, N] instead of the weight ones, to ``out`` ``[K, N]``."""
    period, act_order = codes_per_period(weight.bits), weight.g_idx is not None
    aligned = not act_order and weight.group_size % period == 0
    run = (weight.group_size if aligned else weight.in_features) // period
    periods = min(run & -run, FILL_PERIODS)  # a power of two that divides the run: no program leaves its group
    grid = (weight.in_features // period // periods, triton.cdiv(weight.out_features, FILL_COLUMNS))
    g_idx = weight.g_idx if act_order else weight.qweight  # not read
    with torch.cuda.device_of(out):  # Triton launches on the current device, whichever its tensors are on
        fill_kernel[grid](
            weight.qweight, weight.zeros, weight.scales, _float(offsets, weight), g_idx, out,
            weight.out_features, weight.group_size,
            HAS_OFFSETS=offsets is not None, ALIGNED=aligned, ACT_ORDER=act_order, **layout_constants(weight.bits),
            PERIODS=periods, COLUMNS=FILL_COLUMNS, num_warps=FILL_WARPS,
        )  # fmt: skip


def takes_matmul(tokens: int, weight: GroupwiseWeight) -> bool:
    """Whether :func:`matmul` can run: few tokens, and groups in order that hold whole periods."""
    return 0 < tokens <= MAX_TOKENS and weight.g_idx is None and weight.group_size % codes_per_period(weight.bits) == 0


def matmul(x: Tensor, weight: GroupwiseWeight, offsets: Tensor | None) -> Tensor:
    """``x·w`` with ``offsets`` [G, N] instead of the weight ones: ``[..., K] → [..., N]``, at most 8 tokens.

    K is split over programs until the GPU is full; their float32 sums are then added in a fixed order.
    """
    flat = x.reshape(-1, weight.in_features).contiguous()
    tokens, n = len(flat), weight.out_features
    strips = triton.cdiv(n, MATMUL_COLUMNS)
    blocks = matmul_blocks(tokens, weight.bits)
    steps = triton.cdiv(weight.in_features // codes_per_period(weight.bits), blocks["PERIODS"])
    parts = max(1, min(steps, triton.cdiv(2 * _processors(x.device), strips)))
    each = triton.cdiv(steps, parts)
    partial = flat.new_empty(triton.cdiv(steps, each), tokens, n, dtype=torch.float32)
    with torch.cuda.device_of(x):
        matmul_kernel[(strips, len(partial))](
            flat, weight.qweight, weight.zeros, weight.scales, _float(offsets, weight), partial,
            tokens, weight.in_features, n, weight.group_size, each,
            HAS_OFFSETS=offsets is not None, **layout_constants(weight.bits), **blocks,
        )  # fmt: skip
    return partial.sum(0).to(x.dtype).view(*x.shape[:-1], n)


def matmul_blocks(tokens: int, bits: int) -> dict[str, int]:
    """Constants of :func:`matmul_kernel`: the sums of all tokens fit into the registers."""
    return {
        "TOKENS": triton.next_power_of_2(tokens),
        "PERIODS": 16 if tokens <= 2 and bits >= 4 else 4,
        "COLUMNS": MATMUL_COLUMNS,
    }


_wins: dict[tuple, bool] = {}


def matmul_wins(tokens: int, dtype: torch.dtype, weight: GroupwiseWeight) -> bool:
    """Whether :func:`matmul` beats :func:`fill` and cuBLAS on this GPU: timed once a shape and power of 2 of tokens
    (1, 2, 4, 8), for some 50 ms."""
    tokens, device = triton.next_power_of_2(tokens), weight.qweight.device
    key = (device, dtype, tokens, weight.in_features, weight.out_features, weight.group_size, weight.bits)
    if key not in _wins:
        if torch.cuda.is_current_stream_capturing():
            return False  # nothing can be timed inside a CUDA graph
        trial = torch.ones(tokens, weight.in_features, dtype=dtype, device=device)
        out = trial.new_empty(weight.in_features, weight.out_features)

        def unpacked() -> Tensor:
            fill(weight, weight.offsets, out)
            return trial @ out

        with torch.cuda.device_of(trial):
            fused = do_bench(lambda: matmul(trial, weight, weight.offsets), warmup=5, rep=20)
            _wins[key] = fused < do_bench(unpacked, warmup=5, rep=20)
    return _wins[key]


def layout_constants(bits: int) -> dict[str, int]:
    """Of the bit streams, as the kernels take them."""
    return {"BITS": bits, "PERIOD": codes_per_period(bits), "WORDS": words_per_period(bits)}


def _float(offsets: Tensor | None, weight: GroupwiseWeight) -> Tensor:
    """float32 offsets; a stand-in, never read, where there are none."""
    return weight.scales if offsets is None else offsets.float().contiguous()


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 under Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
