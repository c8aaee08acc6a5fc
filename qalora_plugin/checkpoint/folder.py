"""A safetensors model folder, opened without loading it: files, tensor headers, config. Refuses what is damaged.

Needs neither transformers nor a model class: merge, verify, inspect and the loader all see a checkpoint through this.
Nor torch, until a tensor of it is asked for: torch takes longer to import than many a merge takes.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qalora_plugin.checkpoint import autogptq
from qalora_plugin.checkpoint.hub import resolve
from qalora_plugin.checkpoint.json_files import read_json, short
from qalora_plugin.checkpoint.tensors import (
    EXPONENTS,
    TensorInfo,
    damaged,
    is_finite,
    read_array,
    read_header,
    read_tensor,
)
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_BLOCK = 16 << 20  # bytes
_MASKS = (".masked_bias", ".attn.bias", ".attention.bias")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


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
            found = read_header(folder / file)
            if twice := tensors.keys() & found.keys():
                name = min(twice)
                raise QALoraError(
                    f"{folder}: {tensors[name].file} and {file} both hold {name}, and readers differ in which they "
                    "take. Download or copy the checkpoint again."
                )
            tensors |= found
        if listed is not None:
            for name, file in listed.items():
                if name not in tensors or tensors[name].file != file:
                    raise QALoraError(
                        f"{folder / weights} says that {file} holds the tensor {name!r}, but it does not. "
                        "Download or copy the checkpoint again."
                    )
            modules = {name.rpartition(".")[0] for name in listed}
            for name in tensors.keys() - listed.keys():
                if name.rpartition(".")[0] in modules:  # its order of columns, its bias
                    raise QALoraError(
                        f"{folder / weights} does not list {name}, which {tensors[name].file} holds: readers differ in "
                        "whether they take it. Download or copy the checkpoint again."
                    )
            tensors = {name: info for name, info in tensors.items() if name in listed}
        return cls(folder, config, tensors, files)

    def tensor(self, name: str) -> "Tensor":
        """Load one tensor, as stored."""
        return read_tensor(self.folder, self.tensors[name])

    def array(self, name: str) -> np.ndarray:
        """Load one tensor as a numpy array; bfloat16, which numpy lacks, as float32."""
        return read_array(self.folder, self.tensors[name])

    def require_finite(self, names: Iterable[str]) -> None:
        """Refuse NaN and Inf in the tensors of that name that are floats. Reads all of them, some megabytes at a time.

        Causal masks are left out, which transformers once stored (-1e9, an Inf in float16) and no longer loads.
        """
        for name in names:
            info = self.tensors[name]
            if info.dtype not in EXPONENTS or name.endswith(_MASKS):
                continue
            size = info.end - info.start
            blocks = self.read(name, ((start, min(_BLOCK, size - start)) for start in range(0, size, _BLOCK)))
            if not all(is_finite(block, info.dtype) for block in blocks):
                raise QALoraError(f"{self.folder}: {name} holds NaN or Inf. Download or copy the checkpoint again.")

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
        return self.config.get("quantization_config") or {}

    @property
    def method(self) -> str | None:
        """``quant_method``, or None for a dense checkpoint."""
        return self.quantization.get("quant_method")

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum((self.folder / file).stat().st_size for file in self.files)


def read_config(folder: Path) -> dict:
    """``config.json``, with the quantization that old folders of AutoGPTQ and AutoAWQ keep beside it, and MLX's, which
    stands under another key, too."""
    config = read_json(folder / "config.json")
    quantization = stated_quantization(config, folder)
    beside = next((path for name in autogptq.SETTINGS if (path := folder / name).is_file()), None)
    if beside and not quantization:
        if not isinstance(config.get("model_type"), str):  # what it holds will be written into other folders
            raise QALoraError(
                f"{folder / 'config.json'} names no model_type: it is no model's config. Download or copy it again."
            )
        return config | {"quantization_config": autogptq.read_settings(beside)}
    mlx = config.get("quantization")
    if "quant_method" not in quantization and isinstance(mlx, dict) and "bits" in mlx:
        return config | {"quantization_config": {**mlx, "quant_method": "mlx"}}
    return config


def stated_quantization(config: dict, where: object) -> dict:
    """``quantization_config`` of a ``config.json``; ``{}`` where it has none."""
    found = config.get("quantization_config") or {}
    if not isinstance(found, dict):
        raise QALoraError(
            f"{where}: quantization_config in config.json is {short(found)}, expected an object. Download or copy "
            "config.json again."
        )
    return found


def weights_name(folder: Path, config: dict) -> str:
    """Name of the file that holds the weights, or of their index.

    Raises:
        QALoraError: there is none, or none that can be told from others.
    """
    for name in (SINGLE_NAME, INDEX_NAME):  # transformers, too, prefers the single file over an index
        if (folder / name).is_file():
            return name
    quantization = config.get("quantization_config") or {}
    if found := autogptq.find_weights(folder, quantization.get("model_file_base_name")):
        return found
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
