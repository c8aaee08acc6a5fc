"""GGUF's block types ↔ integer codes with a scale and a minimum for every group: what a block is, bit by bit.

    w[n,k] = scales[n,γ]·(codes[n,k] − 2^(b−1))          symmetric types: Q4_0 Q5_0 Q8_0 Q6_K
    w[n,k] = scales[n,γ]·codes[n,k] + minima[n,γ]        the others: Q4_1 Q5_1 Q4_K Q5_K

K-quants (``_K``) lie in blocks of 256 whose groups' scales are themselves codes; multiplied out they take float32.
Source of the layouts: ggml's ``ggml-common.h`` and ``dequantize_row_*`` in ``ggml-quants.c``.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qalora_plugin.formats.gguf import require_gguf


@dataclass(frozen=True)
class BlockType:
    """Attributes:
    block: columns of a block. nbytes: of a block. group_size: columns that share a scale. bits: of a code.
    symmetric: no minima; the zero-point is 2^(b−1).
    """

    block: int
    nbytes: int
    group_size: int
    bits: int
    symmetric: bool

    @property
    def scale_dtype(self) -> str:
        """What holds every scale of this type: those of K-quants are products of a float16 and an integer."""
        return "float16" if self.block == 32 else "float32"


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 32, 4, True),
    "Q4_1": BlockType(32, 20, 32, 4, False),
    "Q5_0": BlockType(32, 22, 32, 5, True),
    "Q5_1": BlockType(32, 24, 32, 5, False),
    "Q8_0": BlockType(32, 34, 32, 8, True),
    "Q4_K": BlockType(256, 144, 32, 4, False),
    "Q5_K": BlockType(256, 176, 32, 5, False),
    "Q6_K": BlockType(256, 210, 16, 6, True),
}


class Blocks(NamedTuple):
    """A decoded tensor.

    Attributes:
        codes: uint8 ``[N, K]``. scales: float64 ``[N, G]``. minima: float64 ``[N, G]``, None for a symmetric type.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None


def decode(data: np.ndarray, name: str) -> Blocks:
    """Blocks as stored → codes, scales, minima; nothing is rounded.

    Args:
        data: uint8 ``[N, K / block · nbytes]``.
        name: of a type in :data:`BLOCK_TYPES`.
    """
    kind = BLOCK_TYPES[name]
    blocks = data.reshape(len(data), -1, kind.nbytes)  # [N, blocks of a row, bytes]
    codes, scales, minima = _DECODERS[name](blocks)
    rows = len(data)
    return Blocks(
        codes.reshape(rows, -1), scales.reshape(rows, -1), None if minima is None else minima.reshape(rows, -1)
    )


def encode_q4_1(codes: np.ndarray, scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Codes ``[N, K]`` (0 … 15), scales and minima float16 ``[N, K/32]`` → uint8 ``[N, K/32·20]``."""
    rows = len(codes)
    groups = codes.reshape(rows, -1, 32)
    blocks = np.empty((rows, groups.shape[1], 20), np.uint8)
    blocks[..., 0:2] = _bytes(scales)
    blocks[..., 2:4] = _bytes(minima)
    blocks[..., 4:] = groups[..., :16] | groups[..., 16:] << 4
    return blocks.reshape(rows, -1)


def encode_q4_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes ``[N, K]`` (0 … 15, their zero-point 8), scales float16 ``[N, K/32]`` → uint8 ``[N, K/32·18]``."""
    rows = len(codes)
    groups = codes.reshape(rows, -1, 32)
    blocks = np.empty((rows, groups.shape[1], 18), np.uint8)
    blocks[..., 0:2] = _bytes(scales)
    blocks[..., 2:] = groups[..., :16] | groups[..., 16:] << 4
    return blocks.reshape(rows, -1)


def encode_q8_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Signed codes int8 ``[N, K]``, scales float16 ``[N, K/32]`` → uint8 ``[N, K/32·34]``."""
    rows = len(codes)
    groups = codes.reshape(rows, -1, 32)
    blocks = np.empty((rows, groups.shape[1], 34), np.uint8)
    blocks[..., 0:2] = _bytes(scales)
    blocks[..., 2:] = groups.view(np.uint8)
    return blocks.reshape(rows, -1)


def quantize_q8_0(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 ``[N, K]`` → signed codes int8 ``[N, K]`` and scales float16 ``[N, K/32]``, rounded to nearest.

    Of the three float16 numbers around max/127 that which fits best is taken: so weights that came from Q8_0, and were
    rounded to float16 in between, become the same blocks again.
    """
    groups = weight.reshape(len(weight), -1, 32)
    nearest = (np.abs(groups).max(-1) / np.float32(127)).astype(np.float16)
    best = codes = scales = np.empty(0)
    for scale in (nearest, np.nextafter(nearest, np.float16(0)), np.nextafter(nearest, np.float16(np.inf))):
        wide = scale.astype(np.float32)[..., None]
        ratio = np.divide(groups, wide, out=np.zeros_like(groups), where=wide > 0)
        rounded = np.rint(ratio).clip(-127, 127)
        error = np.square(groups - rounded * wide).sum(-1)
        if scale is nearest:
            best, codes, scales = error, rounded, scale
        else:
            better = error < best
            best = np.where(better, error, best)
            codes, scales = np.where(better[..., None], rounded, codes), np.where(better, scale, scales)
    return codes.astype(np.int8).reshape(weight.shape), scales


def _floats(two_bytes: np.ndarray) -> np.ndarray:
    """float16 in bytes ``[…, 2]`` → float64 ``[…, 1]``."""
    return np.ascontiguousarray(two_bytes).view("<f2").astype(np.float64)


def _bytes(halves: np.ndarray) -> np.ndarray:
    """float16 ``[…]`` → bytes ``[…, 2]``."""
    return np.ascontiguousarray(halves, dtype="<f2")[..., None].view(np.uint8)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """``[…, n]`` → ``[…, 2n]``: all low halves, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """``[…, 4]`` → the fifth bits of 32 codes, in place: 0 or 16."""
    words = np.ascontiguousarray(packed).view("<u4")  # [..., 1]
    return (words >> np.arange(32, dtype=np.uint32) & 1).astype(np.uint8) << 4


_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes, scales, minima


def _q4_0(b: np.ndarray) -> _Parts:
    return _nibbles(b[..., 2:]), _floats(b[..., 0:2]), None


def _q4_1(b: np.ndarray) -> _Parts:
    return _nibbles(b[..., 4:]), _floats(b[..., 0:2]), _floats(b[..., 2:4])


def _q5_0(b: np.ndarray) -> _Parts:
    return _nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6]), _floats(b[..., 0:2]), None


def _q5_1(b: np.ndarray) -> _Parts:
    return _nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8]), _floats(b[..., 0:2]), _floats(b[..., 2:4])


def _q8_0(b: np.ndarray) -> _Parts:
    return b[..., 2:] ^ 0x80, _floats(b[..., 0:2]), None  # signed → plus 128


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of the eight groups of blocks of Q4_K or Q5_K, multiplied out: ``[…, 8]`` each."""
    flat = np.ascontiguousarray(b[..., 4:16]).reshape(-1, 12)
    scales, minima = (
        part.reshape(*b.shape[:-1], 8) for part in require_gguf().quants.Q4_K.get_scale_min(flat)
    )  # 6-bit codes, packed in 12 bytes
    return _floats(b[..., 0:2]) * scales, -_floats(b[..., 2:4]) * minima


def _k_nibbles(packed: np.ndarray) -> np.ndarray:
    """``[…, 128]`` → ``[…, 8, 32]``: every 32 bytes hold a group in their low halves, the next in their high ones."""
    return _nibbles(packed.reshape(*packed.shape[:-1], 4, 32)).reshape(*packed.shape[:-1], 8, 32)


def _q4_k(b: np.ndarray) -> _Parts:
    return _k_nibbles(b[..., 16:]), *_k_scales(b)


def _q5_k(b: np.ndarray) -> _Parts:
    fifth = b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit i is group i's
    return _k_nibbles(b[..., 48:]) | fifth << 4, *_k_scales(b)


def _q6_k(b: np.ndarray) -> _Parts:
    halves = b.shape[:-1]
    low, high = b[..., :128].reshape(*halves, 2, 64), b[..., 128:192].reshape(*halves, 2, 1, 32)
    four = np.concatenate([low & 15, low >> 4], -1).reshape(*halves, 2, 4, 32)
    two = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    scales = np.ascontiguousarray(b[..., 192:208]).view(np.int8)
    return four | two << 4, _floats(b[..., 208:210]) * scales, None


_DECODERS = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
