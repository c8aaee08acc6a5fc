"""Blocks → :class:`GroupwiseWeight` and back. Not one code is changed, nothing is rounded on the way in.

Codes of 5 and 6 bits go into 8-bit words. Symmetric types keep their one zero-point, which becomes the container's
2^(b−1) by adding a constant to codes and zero alike: stock GPTQ kernels then take them. Where a type has minima, a
group gets the integer zero-point nearest to −m/d, so that ``offset = m + zero·d`` is small, and zero 0, offset m in the
rare group whose offset float32 could not hold. Everything here is a multiple of 2^−24 below 2^26: float64 is exact.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qalora_plugin.formats.gguf.blocks import BLOCK_TYPES, Blocks

if TYPE_CHECKING:
    from qalora_plugin.core.weight import GroupwiseWeight


class Affine(NamedTuple):
    """A weight as GGUF sees it, rows first: ``w = scales·codes + minima``.

    Attributes:
        codes: uint8 ``[N, K]``. scales, minima: float64 ``[N, G]``. zeros: uint8 ``[N, G]``, as the weight has them.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray
    zeros: np.ndarray


def container_bits(name: str) -> int:
    """Bits of the words that hold the codes of a type: 4 or 8."""
    return 4 if BLOCK_TYPES[name].bits <= 4 else 8


def to_groupwise(blocks: Blocks, name: str) -> "GroupwiseWeight":
    """A decoded tensor as everything else takes it, ``[K, N]``; offsets are float32, None for a symmetric type."""
    import torch

    from qalora_plugin.core.weight import GroupwiseWeight

    kind, bits = BLOCK_TYPES[name], container_bits(name)
    codes, scales, minima = blocks
    if minima is None:
        codes = codes + np.uint8((1 << (bits - 1)) - (1 << (kind.bits - 1)))
        zeros, offsets = np.full(scales.shape, 1 << (bits - 1), np.uint8), None
    else:
        zeros, offsets = _zeros_and_offsets(scales, minima, (1 << bits) - 1)
    return GroupwiseWeight(
        qweight=torch.from_numpy(_words(codes, bits)),
        zeros=torch.from_numpy(np.ascontiguousarray(zeros.T)),
        scales=torch.from_numpy(np.ascontiguousarray(scales.T, dtype=kind.scale_dtype)),
        offsets=None if offsets is None else torch.from_numpy(np.ascontiguousarray(offsets.T, dtype=np.float32)),
        g_idx=None,
        group_order=None,
        bits=bits,
        group_size=kind.group_size,
    )


def to_affine(weight: "GroupwiseWeight") -> Affine:
    """A weight, columns in order, as GGUF's types with minima see it: ``minima = offsets − scales·zeros``."""
    codes = _codes(weight.qweight.numpy(), weight.bits)
    zeros = np.ascontiguousarray(weight.zeros.numpy().T)
    scales = weight.scales.double().numpy().T
    minima = -scales * zeros
    if weight.offsets is not None:
        minima = weight.offsets.double().numpy().T + minima
    return Affine(codes, scales, minima, zeros)


def _zeros_and_offsets(scales: np.ndarray, minima: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        zeros = np.nan_to_num(np.rint(-minima / scales), posinf=0, neginf=0).clip(0, top)
    offsets = minima + zeros * scales
    inexact = offsets.astype(np.float32) != offsets
    zeros[inexact], offsets[inexact] = 0, minima[inexact]
    return zeros.astype(np.uint8), offsets


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 ``[N, K]`` → int32 words along K, ``[K·b/32, N]``."""
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return np.ascontiguousarray(np.ascontiguousarray(codes).view("<i4").T)


def _codes(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 words ``[K·b/32, N]`` → codes uint8 ``[N, K]``: the words of a row are one stream of bits."""
    rows = np.ascontiguousarray(words.T).view(np.uint8)  # [N, K·b/8]
    if bits == 3:
        stream = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, 3)
        return stream[..., 0] | stream[..., 1] << 1 | stream[..., 2] << 2
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (rows[..., None] >> shifts & ((1 << bits) - 1)).reshape(len(rows), -1)
