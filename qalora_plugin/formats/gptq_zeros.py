"""How GPTQ checkpoints store zero-points.

``checkpoint_format`` ``gptq`` (v1) stores zeros − 1, subtracted from the whole 32-bit *word*, so that a zero of 0
borrows from its neighbour; adding 1 back per word undoes that exactly, per field it would not. At 3 bits, where fields
straddle words, v1 is per field modulo 8. ``gptq_v2`` stores the zeros. (GPTQModel ``utils/model.py``,
``convert_gptq_v1_to_v2_format_module``.)
"""

from typing import TYPE_CHECKING

import numpy as np

from qalora_plugin.core.words import codes_per_period, words_per_period

if TYPE_CHECKING:
    from torch import Tensor

V1, V2 = CHECKPOINT_FORMATS = ("gptq", "gptq_v2")


def read_zeros(qzeros: "Tensor", bits: int, reading: str) -> "Tensor":
    """Packed zero-points as stored, int32 ``[G, N·b/32]`` → true ones, uint8 ``[G, N]``."""
    from qalora_plugin.core.packing import unpack_cols

    if reading == V2:
        return unpack_cols(qzeros, bits)
    if bits == 3:
        return (unpack_cols(qzeros, bits) + 1) & 7
    return unpack_cols(qzeros + _one_in_every_field(bits), bits)  # int32, wraps


def write_zeros(zeros: "Tensor", bits: int, reading: str) -> "Tensor":
    """Inverse of :func:`read_zeros`: ``[G, N]`` → int32 ``[G, N·b/32]``."""
    import torch

    from qalora_plugin.core.packing import pack_cols

    if reading == V2:
        return pack_cols(zeros, bits)
    if bits == 3:
        return pack_cols((zeros.to(torch.int64) - 1) & 7, bits)
    return pack_cols(zeros, bits) - _one_in_every_field(bits)  # int32, wraps


def _one_in_every_field(bits: int) -> int:
    return sum(1 << shift for shift in range(0, 32, bits))


def symmetric_words(bits: int, reading: str) -> np.ndarray:
    """A period of ``qzeros`` whose zero-points are all 2^(b−1), as stored: int32 ``[words_per_period]``."""
    field = (1 << (bits - 1)) - (reading != V2)
    stream = sum(field << (bits * i) for i in range(codes_per_period(bits)))
    return np.frombuffer(stream.to_bytes(4 * words_per_period(bits), "little"), dtype="<i4")
