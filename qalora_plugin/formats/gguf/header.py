"""Walks a GGUF header before anything is built from it: every count and length must fit into the file.

The ``gguf`` package's reader believes the header: a mutated array length would have it loop for hours. The layout is
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import mmap
import struct
from pathlib import Path

from qalora_plugin.core.errors import QALoraError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type → bytes
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 65535  # bytes of a key
_MOST_ENTRIES = 1 << 20  # keys, or tensors


def check_header(path: Path) -> None:
    """
    Raises:
        QALoraError: not a GGUF file, of another version or byte order, or cut short.
    """
    if path.stat().st_size < 24:
        raise _damaged(path, "it ends within its first 24 bytes")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(path, data).walk()


def _damaged(path: Path, what: str) -> QALoraError:
    return QALoraError(f"{path} is truncated or damaged ({what}). Download or copy the file again.")


class _Walk:
    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at, self.size = path, data, 0, len(data)

    def walk(self) -> None:
        if self.data[:4] != b"GGUF":
            raise QALoraError(f"{self.path} is no GGUF file (it does not begin with GGUF). Pass a .gguf file.")
        self.at = 4
        version = self.number("<I")
        if version not in _VERSIONS:
            raise QALoraError(
                f"{self.path} is of GGUF version {version}, expected 2 or 3, little-endian. Convert it with a current "
                "llama.cpp."
            )
        tensors, keys = self.number("<Q"), self.number("<Q")
        if max(tensors, keys) > _MOST_ENTRIES:
            raise _damaged(self.path, f"its header counts {keys} keys and {tensors} tensors")
        for _ in range(keys):
            self.skip_string(_LONGEST_NAME)
            self.skip_value(self.number("<I"))
        for _ in range(tensors):
            self.skip_string(_LONGEST_NAME)
            dimensions = self.number("<I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise _damaged(self.path, f"a tensor has {dimensions} dimensions")
            self.skip(8 * dimensions + 4 + 8)

    def skip(self, length: int) -> None:
        if length > self.size - self.at:
            raise _damaged(self.path, f"at byte {self.at} it should hold {length} more, it has {self.size} in all")
        self.at += length

    def number(self, layout: str) -> int:
        start = self.at
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, start)[0]

    def skip_string(self, longest: int | None = None) -> None:
        length = self.number("<Q")
        if longest is not None and length > longest:
            raise _damaged(self.path, f"a name at byte {self.at} has {length} bytes")
        self.skip(length)

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip_string()
        elif kind == _ARRAY:
            item, count = self.number("<I"), self.number("<Q")
            if item in _SCALARS:
                self.skip(count * _SCALARS[item])
            elif item == _STRING:
                if count > self.size:
                    raise _damaged(self.path, f"an array at byte {self.at} counts {count} strings")
                for _ in range(count):
                    self.skip_string()
            else:
                raise _damaged(self.path, f"an array at byte {self.at} holds values of type {item}")
        elif kind in _SCALARS:
            self.skip(_SCALARS[kind])
        else:
            raise _damaged(self.path, f"at byte {self.at} a value is of type {kind}")
