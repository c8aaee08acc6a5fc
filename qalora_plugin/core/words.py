"""How codes of b bits fill 32-bit words: the arithmetic of :mod:`.packing`, without torch.

A row of codes is a little-endian bit stream: code ``i`` holds bits ``i·b … i·b + b − 1``. For b = 2, 4, 8 a word holds
32/b whole codes; for b = 3 a period of three words holds 32 codes, two of which straddle words.
"""

import math

SUPPORTED_BITS = (2, 3, 4, 8)


def codes_per_period(bits: int) -> int:
    """Number of codes in the shortest run of whole 32-bit words (16, 32, 8, 4 for b = 2, 3, 4, 8)."""
    return 32 // math.gcd(32, bits)


def words_per_period(bits: int) -> int:
    """Number of 32-bit words in that run (3 for b = 3, else 1)."""
    return codes_per_period(bits) * bits // 32
