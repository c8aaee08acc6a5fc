"""Tensors → safetensors files of a bounded size, one after the other, and the index over them: the one writer.

Numpy arrays and torch tensors alike; a merge has no torch.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from qalora_plugin.checkpoint.folder import INDEX_NAME
from qalora_plugin.checkpoint.json_files import write_json
from qalora_plugin.formats.qalora import MERGED_PARTS, as_config

if TYPE_CHECKING:
    from torch import Tensor

Array = Union[np.ndarray, "Tensor"]
SHARD_BYTES = 2 << 30


class ShardWriter:
    """Files ``stem.safetensors``, or ``stem-00001-of-0000N.safetensors`` … in ``folder``.

    Args:
        limit: bytes of a file (one tensor may exceed it).
        taken: file names that are not free.
    """

    def __init__(self, folder: Path, stem: str, limit: int = SHARD_BYTES, taken: Iterable[str] = ()):
        self.folder, self.limit, self.taken = folder, limit, set(taken)
        self.stem = stem
        self.nbytes = 0
        self._written: list[list[str]] = []
        self._held: dict[str, Array] = {}
        self._size = 0

    def add(self, name: str, tensor: Array) -> None:
        """Keep a tensor for the current file, which is written first if it would grow too large."""
        size = int(tensor.nbytes)
        if self._held and self._size + size > self.limit:
            self._flush()
        self._held[name] = tensor
        self._size += size
        self.nbytes += size

    def finish(self) -> dict[str, str]:
        """Write what is left; returns tensor → file, the part of an index."""
        if self._held:
            self._flush()
        names = self._final_names()
        for i, name in enumerate(names):
            self._temporary(i).rename(self.folder / name)
        return {tensor: name for name, tensors in zip(names, self._written, strict=True) for tensor in tensors}

    def _flush(self) -> None:
        path = self._temporary(len(self._written))
        arrays = {name: tensor for name, tensor in self._held.items() if isinstance(tensor, np.ndarray)}
        if len(arrays) == len(self._held):
            from safetensors.numpy import save_file

            save_file(arrays, path, metadata={"format": "pt"})
        else:
            from safetensors.torch import save_file as save_tensors
            from torch import as_tensor

            tensors = {name: as_tensor(tensor).contiguous() for name, tensor in self._held.items()}
            save_tensors(tensors, path, {"format": "pt"})
        self._written.append(list(self._held))
        self._held, self._size = {}, 0

    def _temporary(self, i: int) -> Path:
        return self.folder / f".{self.stem}-{i}.writing"

    def _final_names(self) -> list[str]:
        stem, count = self.stem, len(self._written)
        while True:
            names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
            if count == 1:
                names = [f"{stem}.safetensors"]
            if self.taken.isdisjoint(names):
                return names
            stem += "-merged"


def write_index(folder: Path, weight_map: Mapping[str, str], nbytes: int) -> None:
    """``model.safetensors.index.json``."""
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": nbytes}, "weight_map": dict(weight_map)})


def write_config(folder: Path, config: dict[str, Any], quantization: dict[str, Any], names: Iterable[str] = ()) -> None:
    """``config.json`` of a checkpoint of ours, or of a GPTQ base (``quantization["quant_method"]``).

    Args:
        names: of its tensors, or of those among them that a merge writes.
    """
    if quantization.get("quant_method") == "gptq":
        write_json(folder / "config.json", {**config, "quantization_config": quantization})
    else:
        write_json(folder / "config.json", as_config(config, quantization, names))


def write_model(
    folder: Path, config: dict[str, Any], quantization: dict[str, Any], tensors: Iterable[tuple[str, Array]]
) -> None:
    """A whole checkpoint, streamed: tensors by their names on disk, offsets in files of their own, index, config.

    A merge onto this checkpoint links every file but those of the offsets.
    """
    weights, offsets = ShardWriter(folder, "model"), ShardWriter(folder, "offsets")
    for name, tensor in tensors:
        (offsets if name.endswith(MERGED_PARTS) else weights).add(name, tensor)
    weight_map = {**weights.finish(), **offsets.finish()}
    if set(weight_map.values()) == {"model.safetensors"}:
        write_config(folder, config, quantization, weight_map)
        return
    if "model.safetensors" in weight_map.values():  # transformers would prefer it over the index
        only = "model-00001-of-00001.safetensors"
        (folder / "model.safetensors").rename(folder / only)
        weight_map = {name: only if file == "model.safetensors" else file for name, file in weight_map.items()}
    write_index(folder, weight_map, weights.nbytes + offsets.nbytes)
    write_config(folder, config, quantization, weight_map)
