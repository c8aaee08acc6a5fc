"""Tensors of safetensors files, from their headers to arrays. Needs torch only where a torch tensor is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from qalora_plugin.checkpoint.json_files import parse_json, short
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {  # safetensors' names → torch's
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "C64": "complex64",
}  # fmt: skip
EXPONENTS = {  # of floats: words of what size to read them as, and the exponent's bits in one
    "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF0000000000000),
}  # fmt: skip
_LONGEST_NAME = 1000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is, from the file's header; ``start`` and ``end`` are bytes of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0

    @property
    def torch_dtype(self) -> str:
        """torch's name of the dtype; KeyError for one that torch lacks."""
        return _DTYPES[self.dtype]


@os_errors_in_one_line()
def read_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file holds: its header is a length in 8 bytes, then JSON; the tensors' bytes follow.

    Raises:
        QALoraError: the file is missing, truncated or damaged; named, with what is wrong with it.
    """
    if not path.is_file():
        raise QALoraError(
            f"the shard {path.name} is missing from {path.parent}. Download or copy the checkpoint again."
        )
    with open(path, "rb") as file:
        try:
            safe_open(path, framework="np")  # checks that header and length fit together, and every entry
        except (SafetensorError, OSError) as error:
            raise damaged(path, f"; {error}") from error
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    for name in header:
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise QALoraError(
                f"{path} holds a tensor named {short(name)}, which no model has. Do not use a checkpoint from a source "
                "you do not trust."
            )
    return {
        name: TensorInfo(
            path.name, entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"])
        )
        for name, entry in header.items()
    }


def damaged(path: Path, why: str = "") -> QALoraError:
    """A file that holds less than, or other than, its header says."""
    return QALoraError(
        f"{path} is truncated or damaged ({path.stat().st_size} bytes on disk{why}). Download or copy the file again."
    )


def read_tensor(folder: Path, info: TensorInfo) -> "Tensor":
    """One tensor, as stored, read into memory of its own.

    Raises:
        QALoraError: the file has become shorter since its header was read, or torch has no such dtype.
    """
    import torch

    dtype = getattr(torch, _dtype(folder, info))
    data = _read(folder, info)
    return torch.frombuffer(data, dtype=dtype).view(info.shape) if data else torch.empty(info.shape, dtype=dtype)


def read_array(folder: Path, info: TensorInfo) -> np.ndarray:
    """One tensor as a numpy array of its own, bfloat16 as float32.

    Raises:
        QALoraError: the file has become shorter since its header was read, or numpy has no such dtype.
    """
    dtype = _dtype(folder, info)
    if dtype.startswith("float8"):
        raise QALoraError(f"{folder / info.file} holds {dtype} where 16 or 32 bits are expected. Is it damaged?")
    stored = np.ndarray(info.shape, "uint16" if dtype == "bfloat16" else dtype, _read(folder, info))
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored


def all_finite(array: np.ndarray) -> bool:
    """No NaN, no Inf: no exponent of ones. (``isfinite`` takes float16 element by element, 15 times as long.)"""
    exponent = np.array(np.inf, dtype=array.dtype).view(f"u{array.itemsize}")
    return _none_has(array.view(exponent.dtype), exponent)


def is_finite(block: bytes, dtype: str) -> bool:
    """The same of bytes of a tensor, whose dtype is named as files name it and is one of :data:`EXPONENTS`."""
    word, exponent = EXPONENTS[dtype]
    return _none_has(np.frombuffer(block, word), exponent)


def _none_has(words: np.ndarray, bits: np.ndarray | int) -> bool:
    return not ((words & bits) == bits).any()


def _dtype(folder: Path, info: TensorInfo) -> str:
    if info.dtype not in _DTYPES:
        raise QALoraError(
            f"{folder / info.file} holds a tensor of dtype {info.dtype}, expected one of {', '.join(_DTYPES)}. "
            "Save it in one of these."
        )
    return _DTYPES[info.dtype]


def _read(folder: Path, info: TensorInfo) -> bytearray:
    """A tensor's bytes.

    (``safe_open`` would parse the header once more and map the file, whose pages then count as this process's memory:
    at 7 GB that is a third of a merge's time, and more memory than all the rest.)
    """
    data = bytearray(info.end - info.start)
    with open(folder / info.file, "rb", buffering=0) as file:
        file.seek(info.start)
        view = memoryview(data)
        while view and (count := file.readinto(view)):
            view = view[count:]
    if view:
        raise damaged(folder / info.file)
    return data
