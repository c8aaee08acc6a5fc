"""A safetensors model folder, opened without loading it: files, tensor headers, config. Refuses what is damaged.

Needs neither transformers nor a model class: merge, verify, inspect and the loader all see a checkpoint through this.
Nor torch, until a tensor of it is asked for: torch takes longer to import than many a merge takes.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import QALoraError, os_errors_in_one_line
from . import autogptq

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {  # safetensors' names → torch's
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "C64": "complex64",
}  # fmt: skip
_LONGEST_NAME = 1000
_LONGEST_JSON = 256 << 20  # bytes; the index of the largest models takes some 10 MB
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is, from the file's header; ``start`` and ``end`` are bytes of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0


@dataclass
class Checkpoint:
    """A model folder and the headers of its shards.

    Attributes:
        folder: the (resolved) folder.
        config: content of ``config.json``.
        tensors: name → :class:`TensorInfo`, for every tensor of the model.
        files: names of the shards, in index order.
    """

    folder: Path
    config: dict
    tensors: dict[str, TensorInfo]
    files: list[str]

    @classmethod
    @os_errors_in_one_line()
    def open(cls, path: str | Path, revision: str | None = None) -> "Checkpoint":
        """Open a local folder, or a Hub id (downloaded to the Hub cache).

        Raises:
            QALoraError: not a model folder, pickled weights, a missing, truncated or misplaced shard, a bad index.
        """
        folder = resolve(path, revision)
        config = read_config(folder)
        files, listed = _shards(folder, weights := weights_name(folder, config))
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            tensors |= read_header(folder / file)
        if listed is not None:
            for name, file in listed.items():
                if name not in tensors or tensors[name].file != file:
                    raise QALoraError(
                        f"{folder / weights} says that {file} holds the tensor {name!r}, but it does not. "
                        "Download or copy the checkpoint again."
                    )
            tensors = {name: info for name, info in tensors.items() if name in listed}
        return cls(folder, config, tensors, files)

    def tensor(self, name: str) -> "Tensor":
        """Load one tensor, as stored."""
        return read_tensor(self.folder, self.tensors[name])

    def array(self, name: str) -> np.ndarray:
        """Load one tensor as a numpy array; bfloat16, which numpy lacks, as float32."""
        return read_array(self.folder, self.tensors[name])

    def read(self, name: str, spans: Iterable[tuple[int, int]]) -> Iterator[bytes]:
        """Parts ``(start, length)`` of one tensor's bytes."""
        info = self.tensors[name]
        with open(self.folder / info.file, "rb", buffering=0) as file:
            for start, length in spans:
                block = os.pread(file.fileno(), length, info.start + start)
                if len(block) < length:
                    raise damaged(self.folder / info.file)
                yield block

    @cached_property
    def quantization(self) -> dict:
        """``quantization_config`` of the model, ``{}`` for a dense one."""
        found = self.config.get("quantization_config") or {}
        if not isinstance(found, dict):
            raise QALoraError(
                f"{self.folder}: quantization_config in config.json is {short(found)}, expected an object. Download or "
                "copy config.json again."
            )
        return found

    @property
    def method(self) -> str | None:
        """``quant_method``, or None for a dense checkpoint."""
        return self.quantization.get("quant_method")

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum((self.folder / file).stat().st_size for file in self.files)


def is_local(path: str | Path) -> bool:
    """Whether this is a folder here; else :func:`resolve` takes it for a Hub id."""
    return expanded(path).is_dir()


def expanded(path: str | Path) -> Path:
    """``path`` with the home of ``~`` in it."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise QALoraError(f"{path}: {error} Write the folder out.") from error


def resolve(path: str | Path, revision: str | None = None, **hub: Any) -> Path:
    """Local folder as it is; anything that looks like a Hub id through the Hub cache.

    Args:
        hub: passed to ``huggingface_hub.snapshot_download`` (``token``, ``cache_dir`` …).
    """
    folder = expanded(path)
    if is_local(path):
        return folder.resolve()
    if folder.exists():
        raise QALoraError(f"{path} is a file, expected a model folder. Pass the folder that holds config.json.")
    text = str(path)
    if text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise QALoraError(f"the folder {path} does not exist. Pass a local model folder or a Hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=_HUB_PATTERNS, **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise QALoraError(
            f"{path!r} is no local folder, and fetching it from the Hub failed: {error}. "
            "Check the spelling, your connection, and access rights."
        ) from error


@os_errors_in_one_line()
def read_json(path: Path) -> dict:
    """Read a JSON object, with an error that names the file."""
    if not path.is_file():
        raise QALoraError(f"{path.parent} has no {path.name}. Pass a Hugging Face model folder.")
    if path.stat().st_size > _LONGEST_JSON:
        raise QALoraError(f"{path} has {path.stat().st_size} bytes: that is no config. Download or copy it again.")
    return _parse_json(path.read_bytes(), path)


def _parse_json(text: bytes, path: Path) -> dict:
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise QALoraError(f"{path} is nested too deep. Download or copy it again.") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, numbers of thousands of digits, repeated keys
        raise QALoraError(f"{path} is not valid JSON ({error}). Download or copy it again.") from error
    if not isinstance(content, dict):
        raise QALoraError(f"{path} holds {short(content)}, expected a JSON object. Download or copy it again.")
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):  # readers differ in which value they take
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {short(next(name for name in names if names.count(name) > 1))} is there twice")
    return content


def short(value: Any) -> str:
    """A value out of a file, for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}…"


def read_config(folder: Path) -> dict:
    """``config.json``, with the quantisation that AutoGPTQ's older folders keep beside it."""
    config = read_json(folder / "config.json")
    if not config.get("quantization_config") and (folder / autogptq.SETTINGS_NAME).is_file():
        settings = autogptq.as_quantization_config(read_json(folder / autogptq.SETTINGS_NAME))
        return config | {"quantization_config": settings}
    return config


def weights_name(folder: Path, config: dict) -> str:
    """Name of the file that holds the weights, or of their index.

    Raises:
        QALoraError: there is none, or none that can be told from others.
    """
    for name in (SINGLE_NAME, INDEX_NAME):  # transformers, too, prefers the single file over an index
        if (folder / name).is_file():
            return name
    quantization = config.get("quantization_config") or {}
    if name := autogptq.find_weights(folder, quantization.get("model_file_base_name")):
        return name
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise QALoraError(
            f"{folder} holds pickled weights ({', '.join(pickles[:3])}), which can run code when opened and are never "
            "read. Use or make a safetensors version of this checkpoint."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise QALoraError(
            f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}, and several other files of weights "
            f"({', '.join(others[:3])}). Keep one of them, or name it {SINGLE_NAME}."
        )
    raise QALoraError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}. Pass a folder with safetensors weights.")


def write_json(path: Path, content: dict) -> None:
    """As Hugging Face writes its configs, keys in their order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=False) + "\n", encoding="utf-8")


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
        header = _parse_json(file.read(length), path)
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


def _shards(folder: Path, weights: str) -> tuple[list[str], dict[str, str] | None]:
    """Shard names, and the index's ``weight_map`` if ``weights`` is an index."""
    if not autogptq.is_index(weights):
        return [weights], None
    listed = read_json(folder / weights).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise QALoraError(f"{folder / weights} has no weight_map. Download or copy it again.")
    for file in listed.values():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
            raise QALoraError(
                f"{folder / weights} names the file {file!r}: shards must be .safetensors files inside the "
                "folder itself. Do not use a checkpoint from a source you do not trust."
            )
    return list(dict.fromkeys(listed.values())), listed
