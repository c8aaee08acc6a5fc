"""A GGUF file, opened: metadata as plain values, tensors as views of the mapped file."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.formats.gguf import require_gguf
from qalora_plugin.formats.gguf.header import check_header

if TYPE_CHECKING:
    from gguf import GGUFReader

_MISSING = object()


@dataclass(frozen=True)
class GgufTensor:
    """Attributes:
    type: llama.cpp's name of how it is stored (``"Q4_K"``). shape: in torch's order, a linear's is ``(N, K)``.
    data: as stored: bytes of the blocks, ``[…, bytes of a row]``, or floats.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: np.ndarray


class GgufFile:
    """Attributes:
    path: of the file. tensors: by name, in file order. architecture: ``general.architecture``.
    """

    def __init__(self, path: Path, reader: "GGUFReader", tensors: dict[str, GgufTensor]):
        self.path, self._reader, self.tensors = path, reader, tensors
        self._read: dict[str, Any] = {}  # a vocabulary takes a while to decode
        self.architecture = self.value("general.architecture", str)

    @classmethod
    @os_errors_in_one_line()
    def open(cls, path: str | Path) -> "GgufFile":
        """
        Raises:
            QALoraError: no GGUF file, truncated, damaged, or one of several parts.
        """
        gguf = require_gguf()
        path = Path(path).expanduser()
        if not path.is_file():
            raise QALoraError(f"{path} is no file. Pass a .gguf file.")
        check_header(path)
        try:
            reader = gguf.GGUFReader(path)
            tensors = {
                tensor.name: GgufTensor(
                    tensor.name, tensor.tensor_type.name, tuple(map(int, reversed(tensor.shape))), tensor.data
                )
                for tensor in reader.tensors
            }
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
            raise QALoraError(
                f"{path} is truncated or damaged ({short(str(error))}). Download or copy the file again."
            ) from error
        opened = cls(path, reader, tensors)
        if (parts := opened.value("split.count", int, 1)) > 1:
            raise QALoraError(
                f"{path} is one of {parts} parts. Join them first: llama-gguf-split --merge FIRST_PART WHOLE.gguf."
            )
        return opened

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key in self._reader.fields if not key.startswith("GGUF."))

    def value(self, key: str, kind: type | tuple[type, ...], default: Any = _MISSING) -> Any:
        """One value of the metadata.

        Args:
            kind: what it must be (``int``, ``float``, ``str``, ``bool``, ``list``).
            default: where the key is missing; without, that is an error.
        """
        field = self._reader.fields.get(key)
        if field is None:
            if default is _MISSING:
                raise QALoraError(f"{self.path} has no {key} in its metadata. Download or copy the file again.")
            return default
        if key not in self._read:
            try:
                self._read[key] = field.contents()
            except ValueError as error:
                raise QALoraError(f"{self.path}: {key} is damaged ({error}). Download or copy it again.") from error
        found = self._read[key]
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise QALoraError(f"{self.path}: {key} is {short(found)}, expected {_named(kind)}. The file is damaged.")
        return found

    def number(self, key: str, default: Any = _MISSING, most: int = 1 << 31) -> Any:
        """``<architecture>.<key>``, a whole number from 1 to ``most``."""
        found = self.value(f"{self.architecture}.{key}", int, default)
        if found is not default and not 1 <= found <= most:
            raise QALoraError(f"{self.path}: {self.architecture}.{key} is {found}, expected 1 … {most}.")
        return found

    def real(self, key: str, default: Any = _MISSING) -> Any:
        """``<architecture>.<key>``, a finite number."""
        found = self.value(f"{self.architecture}.{key}", (float, int), default)
        if found is not default and not np.isfinite(found):
            raise QALoraError(f"{self.path}: {self.architecture}.{key} is {found}, expected a finite number.")
        return found

    def fields(self) -> Mapping[str, tuple[Any, list]]:
        """Every value with its types, as the writer of the ``gguf`` package takes them."""
        return {key: (self._reader.fields[key].contents(), self._reader.fields[key].types) for key in self.keys}


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(one.__name__ for one in kinds)
