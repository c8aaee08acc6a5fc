"""Packed words ↔ integer codes, in plain torch: bit streams along K (dim 0) or N (dim 1), as :mod:`.words` says."""

import torch
from torch import Tensor

from qalora_plugin.core.words import codes_per_period, words_per_period


def code_plane(words: Tensor, bits: int, j: int) -> Tensor:
    """Code ``j`` of every period: rows ``j::codes_per_period`` of the unpacked tensor.

    Args:
        words: int32 ``[W, N]``, packed along dim 0.
        j: position inside the period, ``0 … codes_per_period − 1``.

    Returns:
        int32 ``[W / words_per_period, N]``, values ``0 … 2^b − 1``.
    """
    word, shift = divmod(j * bits, 32)
    stride = words_per_period(bits)
    mask = (1 << bits) - 1
    low = words[word::stride] >> shift
    in_first = 32 - shift
    if in_first >= bits:
        return low & mask
    low = low & ((1 << in_first) - 1)
    high = words[word + 1 :: stride] & ((1 << (bits - in_first)) - 1)
    return low | (high << in_first)


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """int32 ``[K·b/32, N]`` → uint8 codes ``[K, N]`` (as in ``qweight``)."""
    period = codes_per_period(bits)
    rows = words.shape[0] // words_per_period(bits) * period
    codes = torch.empty(rows, words.shape[1], dtype=torch.uint8, device=words.device)
    for j in range(period):
        codes[j::period] = code_plane(words, bits, j).to(torch.uint8)
    return codes


def unpack_cols(words: Tensor, bits: int) -> Tensor:
    """int32 ``[G, N·b/32]`` → uint8 codes ``[G, N]`` (as in ``qzeros``)."""
    if bits == 3:
        return unpack_rows(words.t(), bits).t().contiguous()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1).to(torch.uint8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[K, N]`` (any integer dtype, values ``0 … 2^b − 1``) → int32 ``[K·b/32, N]``."""
    period, stride = codes_per_period(bits), words_per_period(bits)
    if codes.shape[0] % period:
        raise ValueError(f"{codes.shape[0]} rows cannot be packed at {bits} bits: not a multiple of {period}")
    words = torch.zeros(codes.shape[0] // period * stride, codes.shape[1], dtype=torch.int64, device=codes.device)
    for j in range(period):
        word, shift = divmod(j * bits, 32)
        plane = codes[j::period].to(torch.int64)  # all of them at once take 8 bytes a code
        words[word::stride] |= (plane << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[word + 1 :: stride] |= plane >> (32 - shift)
    return _to_int32(words)


def pack_cols(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[G, N]`` → int32 ``[G, N·b/32]``."""
    return pack_rows(codes.t(), bits).t().contiguous()


def _to_int32(words: Tensor) -> Tensor:
    """int64 → int32 modulo 2^32 (two's complement)."""
    return (((words & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)
