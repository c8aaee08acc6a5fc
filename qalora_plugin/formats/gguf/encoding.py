"""One tensor of a checkpoint → the blocks or floats of a GGUF tensor, and what that costs.

2-, 3- and 4-bit codes go into Q4_1 as they are: ``d`` is the scale, ``m`` the float16 number nearest to
``offset − scale·zero``. What is symmetric and has no offsets needs no minimum: 4 bits go into Q4_0, 8 bits into Q8_0,
exactly. 8 bits with offsets have no exact form in llama.cpp: they become F16, or Q8_0 of the rounded weight.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf.blocks import encode_q4_0, encode_q4_1, encode_q8_0, quantize_q8_0
from qalora_plugin.formats.gguf.groupwise import Affine, to_affine

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
DENSE_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_ROWS = 1024  # of a dense weight, computed at a time


@dataclass
class Loss:
    """What writing a tensor cost; zeros where nothing was rounded.

    Attributes:
        largest_step: the largest error of a weight whose codes are kept, in steps of its group (its scale).
        mean_step: of the minima's rounding, over groups.
        scales: the largest relative error of a scale that float16 cannot hold.
        dense: the largest error of a dense weight, as a share of the largest value of its row.
    """

    largest_step: float = 0.0
    mean_step: float = 0.0
    scales: float = 0.0
    dense: float = 0.0


def type_of(spec: GroupwiseSpec, symmetric: bool, eight_bit: str) -> str:
    """The type that a quantized linear is written as.

    Args:
        symmetric: whether every zero-point is 2^(b−1). eight_bit: ``F16`` or ``Q8_0``, for what has no exact form.

    Raises:
        Unsupported: its groups do not consist of whole blocks.
    """
    plain = symmetric and spec.offset_dtype is None and spec.scale_dtype == "float16"
    whole = spec.group_size % BLOCK == 0
    if spec.bits == 8:
        return "Q8_0" if plain and whole else eight_bit if spec.in_features % BLOCK == 0 else "F16"
    if not whole:
        raise Unsupported(
            f"{spec.name} has groups of {spec.group_size} columns, and a block of GGUF has {BLOCK}: a group must be a "
            f"multiple of {BLOCK}.",
            "Serve it with vLLM or transformers, or quantize the base again with groups of 32, 64 or 128.",
        )
    return "Q4_0" if plain and spec.bits == 4 else "Q4_1"


def encode(weight: GroupwiseWeight, kind: str, symmetric: bool, order: np.ndarray | None) -> tuple[np.ndarray, Loss]:
    """A quantized weight as GGUF stores it: uint8 ``[N, bytes of a row]``, or float16 ``[N, K]`` for F16.

    Args:
        kind: from :func:`type_of`. symmetric: as there. order: of rows, as GGUF has them.

    Raises:
        OverflowError: a value that float16 cannot hold.
    """
    import torch

    affine = to_affine(weight)
    if order is not None:
        affine = Affine(*(part[order] for part in affine))
    blocks = weight.group_size // BLOCK
    if kind == "Q4_1":
        scales, minima = _half(affine.scales), _half(affine.minima)
        packed = encode_q4_1(affine.codes, scales.repeat(blocks, 1), minima.repeat(blocks, 1))
        return packed, _step_loss(affine, scales, minima, (1 << weight.bits) - 1)
    if kind == "Q4_0":
        return encode_q4_0(affine.codes, _half(affine.scales).repeat(blocks, 1)), Loss()
    if kind == "Q8_0" and symmetric and weight.offsets is None and blocks and weight.scales.dtype == torch.float16:
        return encode_q8_0((affine.codes ^ 0x80).view(np.int8), _half(affine.scales).repeat(blocks, 1)), Loss()
    return _dense_rows(affine, weight.group_size, kind)


def encode_dense(tensor: "Tensor", kind: str, shift: int, order: np.ndarray | None) -> tuple[np.ndarray, Loss]:
    """A dense tensor as ``kind`` (F32, F16, BF16 or Q8_0).

    Raises:
        OverflowError: a value that float16 cannot hold.
    """
    import torch

    if order is not None:
        tensor = tensor[torch.from_numpy(order)]
    if kind == "BF16":
        return tensor.contiguous().view(torch.uint8).numpy(), Loss()
    if kind == "F16" and tensor.dtype == torch.float16:
        return tensor.contiguous().numpy(), Loss()
    if kind == "F32":
        return (tensor.float() + shift).numpy(), Loss()
    parts = [_rounded(tensor[start : start + _ROWS].double().numpy(), kind) for start in range(0, len(tensor), _ROWS)]
    return np.concatenate([data for data, _ in parts]), Loss(dense=max(loss for _, loss in parts))


def row_bytes(columns: int, kind: str) -> int:
    """Bytes of a row of ``columns`` values."""
    from qalora_plugin.formats.gguf.blocks import BLOCK_TYPES

    if kind in BLOCK_TYPES:
        return columns // BLOCK_TYPES[kind].block * BLOCK_TYPES[kind].nbytes
    return columns * (4 if kind == "F32" else 2)


def _half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise OverflowError(f"{np.abs(values).max():.3g}")
    return half


def _step_loss(affine: Affine, scales: np.ndarray, minima: np.ndarray, top: int) -> Loss:
    """A weight's error is linear in its code: it is largest at the least or the greatest code."""
    step = np.abs(affine.scales)
    there = step > 0
    step = np.where(there, step, 1)
    by_minimum = minima.astype(np.float64) - affine.minima
    by_scale = scales.astype(np.float64) - affine.scales
    worst = np.maximum(np.abs(by_minimum), np.abs(by_minimum + top * by_scale)) / step
    return Loss(
        largest_step=float(worst[there].max(initial=0)),
        mean_step=float((np.abs(by_minimum) / step)[there].mean()) if there.any() else 0.0,
        scales=float((np.abs(by_scale) / step)[there].max(initial=0)),
    )


def _dense_rows(affine: Affine, group_size: int, kind: str) -> tuple[np.ndarray, Loss]:
    parts = []
    for start in range(0, len(affine.codes), _ROWS):
        codes, scales, minima = (part[start : start + _ROWS] for part in affine[:3])
        exact = codes * scales.repeat(group_size, 1) + minima.repeat(group_size, 1)
        parts.append(_rounded(exact, kind))
    return np.concatenate([data for data, _ in parts]), Loss(dense=max(loss for _, loss in parts))


def _rounded(exact: np.ndarray, kind: str) -> tuple[np.ndarray, float]:
    """float64 ``[n, K]`` as F16 or Q8_0, and the largest error as a share of the largest value of its row."""
    if kind == "F16":
        stored = data = _half(exact)
    else:
        codes, scales = quantize_q8_0(exact.astype(np.float32))
        _half(np.abs(exact).max(keepdims=True) / 127)
        data, stored = encode_q8_0(codes, scales), codes * scales.astype(np.float64).repeat(BLOCK, 1)
    largest = np.abs(exact).max(1)
    error = np.abs(stored.astype(np.float64) - exact).max(1)
    return data, float((error / np.where(largest > 0, largest, 1)).max())
