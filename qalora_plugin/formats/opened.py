"""A quantized checkpoint, opened: its files, its format, its linears. Merge, verify, export and loading work on it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qalora_plugin.checkpoint.fingerprint import fingerprint
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.formats.autoround import AutoRound
from qalora_plugin.formats.base import CheckpointFormat, Unsupported
from qalora_plugin.formats.fusion import dense_modules, unservable
from qalora_plugin.formats.gptq import Gptq, column_groups, is_act_order
from qalora_plugin.formats.qalora import FACTORS, QALora

BASES: tuple[type[Gptq], ...] = (Gptq, AutoRound, QALora)  # what adapters go onto
_MAKE_ONE = "Make a GPTQ checkpoint of the original 16-bit model: qalora quantize MODEL OUT."
_IMPORTS = {"awq": "awq", "compressed-tensors": "compressed-tensors"}


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """Attributes:
    files: the folder. format: how its quantized linears are stored. specs: these, by name, in checkpoint order.
    """

    files: Checkpoint
    format: CheckpointFormat
    specs: dict[str, GroupwiseSpec]

    @classmethod
    def open(cls, path: str | Path, revision: str | None = None) -> "QuantizedCheckpoint":
        """Open a folder or Hub id that an adapter can go onto, or that is a merge; see :meth:`of`."""
        return cls.of(Checkpoint.open(path, revision))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "QuantizedCheckpoint":
        """
        Raises:
            QALoraError: it is of another kind, or breaks a rule of its format.
        """
        kind = base_format(checkpoint.quantization)
        if kind is None:
            raise QALoraError(f"{checkpoint.folder} cannot be a base: {_why_not_base(checkpoint)}")
        found = kind(checkpoint.quantization, checkpoint.folder)
        return cls(checkpoint, found, found.specs(checkpoint.tensors, checkpoint.folder))

    @property
    def folder(self) -> Path:
        return self.files.folder

    @property
    def has_offsets(self) -> bool:
        return any(spec.offset_dtype for spec in self.specs.values())

    def weight(self, name: str) -> GroupwiseWeight:
        """One linear, read from disk."""
        return self.format.read(self.specs[name], self.files.tensor)

    def column_groups(self, name: str) -> np.ndarray:
        """The group of every column of one linear, int ``[K]``."""
        return column_groups(self.specs[name], self.files.array)

    def offsets(self, name: str) -> np.ndarray | None:
        """What one linear has already, ``[G, N]``; None for nothing, or where it is factored."""
        spec = self.specs[name]
        return self.files.array(f"{name}.offsets") if spec.offset_dtype and not spec.offset_rank else None

    def offset_factors(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The factors ``[G, r]``, ``[r, N]`` of one linear's offsets; None where they are dense, or there are none."""
        if not self.specs[name].offset_rank:
            return None
        a, b = (self.files.array(f"{name}.{part}") for part in FACTORS)
        return a, b

    def scales(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """The scales of one linear, float32 ``[G, N]``, and what merges changed them by; None for nothing."""
        scales = self.files.array(f"{name}.scales").astype(np.float32)
        if not self.specs[name].scales_delta_dtype:
            return scales, None
        delta = self.files.array(f"{name}.scales_delta").astype(np.float32)
        return scales + delta, delta

    def require_own_head(self) -> None:
        """Refuse a quantized head that the config ties to the embeddings: other runtimes then use those.

        Raises:
            Unsupported: so it is.
        """
        if self.files.config.get("tie_word_embeddings") and "lm_head" in self.specs:
            raise Unsupported(
                f"{self.folder}: lm_head is quantized, but its config ties it to the embeddings, which would be used.",
                "Set tie_word_embeddings to false in config.json if the head is the model's own.",
            )

    def check_values(self) -> None:
        """Refuse NaN, Inf, and an act-order index that is none. Reads 1/g of the whole."""
        for spec in self.specs.values():
            self.format.check_values(spec, self.files.array, self.folder)

    def check_dense_values(self) -> None:
        """Refuse NaN and Inf in what is not quantized: a router, a norm, the embedding. Reads all of it."""
        packed = {f"{name}.{part}" for name, spec in self.specs.items() for part in self.format.parts(spec)}
        self.files.require_finite(name for name in self.files.tensors if name not in packed)

    @cached_property
    def symmetric(self) -> bool:
        """Whether every zero-point of every linear is 2^(b−1)."""
        return all(self.format.is_symmetric(spec, self.files.array) for spec in self.specs.values())

    @cached_property
    def act_order(self) -> bool:
        """Whether any linear's columns were quantized out of order."""
        return any(is_act_order(spec, self.files.array) for spec in self.specs.values())

    def why_not_servable(self) -> str | None:
        """See :func:`~qalora_plugin.formats.fusion.unservable`."""
        return unservable(self.specs, dense_modules(self.files.tensors), self.files.config)

    def fingerprint(self, like: str | None = None) -> str:
        """See :func:`~qalora_plugin.checkpoint.fingerprint.fingerprint`.

        Where the base has offsets, which no fingerprint of samples covers, it is of the new kind whatever ``like`` is:
        adapters of that kind are older than bases with offsets.
        """
        return fingerprint(self.files, self.format.reading, None if self.has_offsets else like)


def base_format(quantization: dict[str, Any]) -> type[Gptq] | None:
    """The format that a ``quantization_config`` names, if an adapter can go onto it."""
    return next((kind for kind in BASES if kind.detect(quantization)), None)


def _why_not_base(checkpoint: Checkpoint) -> str:
    method: object = checkpoint.method  # whatever a file says
    if method is None and checkpoint.quantization:
        return f"its quantization_config names no quant_method, expected 'gptq'. {_MAKE_ONE}"
    packed = next((name for name in checkpoint.tensors if name.endswith((".qweight", ".weight_packed"))), None)
    if method is None and packed:
        return (
            f"it holds {packed}, but config.json has no quantization_config, which says how that is packed. Download "
            "or copy config.json again."
        )
    if method is None:
        return f"it is dense (config.json has no quantization_config). {_MAKE_ONE}"
    if isinstance(method, str) and method in _IMPORTS:
        return (
            f"its quant_method is {method!r}, expected 'gptq'. Convert it, no code is changed: qalora import "
            f"{_IMPORTS[method]} SRC OUT."
        )
    return f"its quant_method is {method!r}, expected 'gptq'. {_MAKE_ONE}"
