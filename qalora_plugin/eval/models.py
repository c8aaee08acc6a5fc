"""The models that are measured: opened and checked first, all of them; loaded later, one at a time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from qalora_plugin.checkpoint.adapter_config import naming
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder, is_adapter_folder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.hub import expanded, is_local, require_use_of_revision
from qalora_plugin.core.errors import QALoraError, printable
from qalora_plugin.eval.limits import model_config, positions, vocabulary
from qalora_plugin.eval.tokens import load_tokenizer
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.served_bits import SizeReport, served_bits

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_TOKENIZER_CONFIG = "tokenizer_config.json"
_FLOATS = ("F16", "BF16", "F32", "F64")
_MATRICES = (".weight", "_proj")  # transformers stacks experts into parameters of their own
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "lm_head", "embed_out", "embed_in", "output_projection")


@dataclass(frozen=True)
class Subject:
    """A model to measure: a checkpoint, with or without an adapter on it.

    Attributes:
        name: as it was asked for. source: folder or Hub id of the checkpoint. files: the checkpoint.
        quantized: the same, opened as one; None of a dense one.
    """

    name: str
    source: str
    files: Checkpoint
    quantized: QuantizedCheckpoint | None = None
    adapter: AdapterFolder | None = None

    @classmethod
    def open(cls, model: str, adapter: str | None = None, revision: str | None = None) -> "Subject":
        """
        Args:
            model: a folder or Hub id of a dense model, a base or a merge; the folder of an adapter, which names its
                base; or ``BASE+ADAPTER``.
            adapter: on ``model``, which is its base.

        Raises:
            QALoraError: it is none, of a kind that cannot be loaded, or base and adapter do not belong together.
        """
        name = model if adapter is None else f"{model}+{adapter}"
        base, adapter = _parts(model) if adapter is None else (model, adapter)
        opened = None if adapter is None else AdapterFolder.open(adapter)
        named_by = adapter if base is None else None
        if opened is not None and base is None:
            base = opened.config.get("base_model_name_or_path")
            if not base:
                raise QALoraError(f"the adapter {adapter} does not name its base. Pass BASE+{adapter}.")
        with naming(named_by, f"BASE+{adapter}"):
            files = Checkpoint.open(str(base), revision)
        quantized = QuantizedCheckpoint.of(files) if files.quantization or opened is not None else None
        if quantized is None:
            files.require_finite(files.tensors)  # every figure of it would be NaN
        else:
            quantized.check_values()
            quantized.check_dense_values()
            if opened is not None:
                opened.require_base(quantized.fingerprint(opened.base_fingerprint), str(base))
                opened.check_fits(quantized.specs)
                opened.check_values()
        subject = cls(name, str(base), files, quantized, opened)
        subject._require_model()
        return subject

    @property
    def label(self) -> str:
        """The name for tables."""
        return printable(self.name).replace("\n", " ")

    @property
    def nbytes(self) -> int:
        """Bytes on disk: shards, and the adapter's weights."""
        return self.files.nbytes + sum(info.end - info.start for info in self._adapter_tensors)

    @property
    def kind(self) -> str:
        """``dense``, ``base``, ``merged``, or ``base + adapter``."""
        if self.quantized is None:
            return "dense"
        if self.adapter is not None:
            return "base + adapter"
        return "merged" if self.files.quantization.get("adapter") else "base"

    @cached_property
    def served(self) -> SizeReport:
        """What the linears take: of a quantized model those that are quantized, an unmerged adapter's factors
        included; of a dense one its matrices but embeddings and head."""
        if self.quantized is None:
            return _dense_size(self.files)
        report = served_bits(self.quantized.specs.values(), self.quantized.act_order)
        factors = sum(8 * (info.end - info.start) for info in self._adapter_tensors)
        return report.plus("adapter", factors) if factors else report

    @property
    def _adapter_tensors(self) -> list[Any]:
        return [] if self.adapter is None else list(self.adapter.tensors.values())

    @property
    def longest(self) -> int | None:
        """Most tokens of a sequence, as the config says; None if it does not."""
        return positions(self._config)

    @property
    def vocabulary(self) -> int | None:
        """Tokens that it has embeddings and logits for, as the config says; None if it does not."""
        return vocabulary(self._config)

    @cached_property
    def _config(self) -> "PretrainedConfig":
        return model_config(self.files.folder)

    def _require_model(self) -> None:
        """Refuse a folder that is no model which continues text, or a dense one with a tensor less than that has."""
        from qalora_plugin.integrations.transformers.dense_models import empty_model
        from qalora_plugin.integrations.transformers.loading import auto_class

        auto_class(self._config, None)
        if self.quantized is None:
            empty_model(self.files.folder, self.label)

    @cached_property
    def tokenizer(self) -> Any:
        """The training run's own where the adapter's folder holds one, as a merge takes it.

        Raises:
            QALoraError: transformers cannot load it.
        """
        folder = self.files.folder
        if self.adapter is not None and (self.adapter.folder / _TOKENIZER_CONFIG).is_file():
            folder = self.adapter.folder
        return load_tokenizer(folder)

    @contextmanager
    def loaded(self, dtype: "torch.dtype", device: str) -> Iterator[Any]:
        """The model, in evaluation mode; its memory is free again afterwards.

        Raises:
            QALoraError: transformers cannot load it.
        """
        import torch

        model = self._load(dtype).to(device).eval()
        try:
            yield model
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _load(self, dtype: "torch.dtype") -> Any:
        from qalora_plugin.integrations.transformers.loading import load_base

        try:
            if self.quantized is None:
                from qalora_plugin.integrations.transformers.dense_models import load_dense

                return load_dense(self.files.folder, self.label, dtype=dtype)
            if self.adapter is None:
                return load_base(self.files.folder, dtype=dtype)
            from qalora_plugin.integrations.peft.loading import load_adapter

            base = load_base(self.files.folder, model_class=self.adapter.model_class, dtype=dtype)
            return load_adapter(base, self.adapter.folder)
        except (ImportError, OSError, RuntimeError) as error:  # a package or a file is missing, memory is short
            raise QALoraError(f"{self.label} cannot be loaded: {error}") from error


def open_all(models: list[str], adapters: list[str], revision: str | None = None) -> list[Subject]:
    """All models, checked before any long work.

    Args:
        adapters: each a further one, on the first of ``models``.

    Raises:
        QALoraError: as :meth:`Subject.open`, or there is a revision of nothing.
    """
    pairs = [*((model, None) for model in models), *((models[0], adapter) for adapter in adapters)]
    subjects = [Subject.open(model, adapter, revision) for model, adapter in pairs]
    require_use_of_revision(revision, [subject.source for subject in subjects])
    return subjects


def _parts(model: str) -> tuple[str | None, str | None]:
    """Base and adapter of what a user names; None for what it does not say."""
    if is_local(model):
        folder = expanded(model)
        return (None, model) if is_adapter_folder(folder) else (model, None)
    base, plus, adapter = model.rpartition("+")
    if plus and base and is_local(adapter):
        return base, adapter
    if plus and is_local(base):
        raise QALoraError(f"{model} is no folder, and neither is {adapter!r}. Pass BASE+ADAPTER, two folders.")
    return model, None


def _dense_size(files: Checkpoint) -> SizeReport:
    weights, bits = 0, 0
    for name, info in files.tensors.items():
        if len(info.shape) > 1 and name.endswith(_MATRICES) and not any(part in name for part in _EMBEDDINGS):
            weights, bits = weights + prod(info.shape), bits + 8 * (info.end - info.start)
    return SizeReport(weights, {"weights": bits} if weights else {})
