"""How codes of b bits fill 32-bit words: the arithmetic of :mod:`.layout`, without torch.

A row of codes is a little-endian bit stream: code ``i`` holds bits ``i·b … i·b + b − 1``. For b = 2, 4, 8 a word holds
32/b whole codes; for b = 3 a period of three words holds 32 codes, two of which straddle words.
"""

import math

import numpy as np

SUPPORTED_BITS = (2, 3, 4, 8)


def codes_per_period(bits: int) -> int:
    """Number of codes in the shortest run of whole 32-bit words (16, 32, 8, 4 for b = 2, 3, 4, 8)."""
    return 32 // math.gcd(32, bits)


def words_per_period(bits: int) -> int:
    """Number of 32-bit words in that run (3 for b = 3, else 1)."""
    return codes_per_period(bits) * bits // 32


def zero_shift(bits: int, checkpoint_format: str) -> int:
    """What to add to every word of ``qzeros``, modulo 2^32, for true zeros: v1 needs 1 in every field (not 3 bits)."""
    return 0 if checkpoint_format == "gptq_v2" else sum(1 << shift for shift in range(0, 32, bits))


def symmetric_words(bits: int, checkpoint_format: str) -> np.ndarray:
    """A period of ``qzeros`` whose zero-points are all 2^(b−1), as stored: int32 ``[words_per_period]``."""
    field = (1 << (bits - 1)) - (checkpoint_format != "gptq_v2")
    stream = sum(field << (bits * i) for i in range(codes_per_period(bits)))
    return np.frombuffer(stream.to_bytes(4 * words_per_period(bits), "little"), dtype="<i4")
