"""A saved adapter, opened without the model: what merge and verify need from it."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import QALoraError
from .quant.checkpoint import TensorInfo, read_array, read_header, read_json
from .quant.modules import QuantizedModule, all_finite
from .quant.naming import stored_name

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_TYPE = "QALORA"
ADAPTER_FORMAT = 1
POOLING = "sum"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


def check_pooling(qalora: dict, what: str) -> None:
    """Refuse an adapter that this version would scale wrongly."""
    for key, expected in {"pooling": POOLING, "format_version": ADAPTER_FORMAT}.items():
        if qalora.get(key) != expected:
            raise QALoraError(
                f"{what} has {key} {qalora.get(key)!r}, expected {expected!r}: it would be scaled wrongly. "
                "Train it with this version of qalora."
            )


@dataclass
class AdapterFolder:
    """Config and tensor names of one adapter of ours.

    Attributes:
        folder: where it lies.
        config: content of ``adapter_config.json``.
        keys: the adapted linears, name in the base checkpoint → name in the model that was trained, which the file's
            names are made of.
        tensors: what the weights file holds, by the file's own names.
    """

    folder: Path
    config: dict
    keys: dict[str, str]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, folder: str | Path) -> "AdapterFolder":
        """
        Raises:
            QALoraError: no adapter, not one of ours, pickled, incomplete or damaged.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise QALoraError(f"the adapter folder {folder} does not exist. Pass the training run's output folder.")
        config = read_json(folder / CONFIG_NAME)
        if config.get("peft_type") != PEFT_TYPE:
            pooled = " with use_qalora, which pools sum·K/g² instead of the sum" if config.get("use_qalora") else ""
            raise QALoraError(
                f"{folder} is a PEFT {config.get('peft_type')} adapter{pooled}; expected a QA-LoRA adapter of this "
                f"project (peft_type {PEFT_TYPE}). Merging it would scale it wrongly. Train with `adapter: qalora`."
            )
        check_pooling(config.get("qalora") or {}, str(folder))
        if not (folder / WEIGHTS_NAME).is_file():
            pickled = (
                " (adapter_model.bin is a pickle and is never read)" if (folder / "adapter_model.bin").exists() else ""
            )
            raise QALoraError(f"{folder} has no {WEIGHTS_NAME}{pickled}. Save the adapter again with safetensors.")
        found: dict[str, set[str]] = {}
        tensors = read_header(folder / WEIGHTS_NAME)
        for key in tensors:
            match = _KEY.fullmatch(key)
            if match is None:
                raise QALoraError(
                    f"{folder / WEIGHTS_NAME} holds {key!r}, which is no pooled adapter weight and cannot be merged. "
                    "Train without modules_to_save and with `adapter: qalora` alone."
                )
            found.setdefault(match["module"], set()).add(match["part"])
        half = [module for module, parts in found.items() if len(parts) < 2]
        if half or not found:
            raise QALoraError(
                f"{folder / WEIGHTS_NAME} lacks A or B of {half[0] if half else 'every layer'}. Save it again."
            )
        prefixes = config["qalora"].get("names") or {}
        if not isinstance(prefixes, dict) or not all(isinstance(part, str) for part in prefixes.values()):
            raise QALoraError(f"{folder / CONFIG_NAME}: qalora.names is no mapping of names to names. Save it again.")
        keys = {stored_name(module, prefixes): module for module in sorted(found)}
        if len(keys) < len(found):
            raise QALoraError(f"{folder / CONFIG_NAME}: qalora.names gives two linears one name. Save it again.")
        return cls(folder, config, dict(sorted(keys.items())), tensors)

    @property
    def modules(self) -> list[str]:
        """Names of the adapted linears, as in the base checkpoint."""
        return list(self.keys)

    @property
    def model_class(self) -> str | None:
        """Name of the transformers class that was trained; None in adapters of older versions."""
        return self.config["qalora"].get("model_class")

    @property
    def base_fingerprint(self) -> str | None:
        return self.config["qalora"].get("base_fingerprint")

    def digest(self) -> str:
        """``"sha256:…"`` of the adapter's weights file."""
        with open(self.folder / WEIGHTS_NAME, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

    def require_base(self, fingerprint: str, base: str | Path) -> None:
        """Refuse a base other than the one trained on."""
        if self.base_fingerprint != fingerprint:
            raise QALoraError(
                f"the adapter {self.folder} was trained on another base: it records {self.base_fingerprint}, {base} is "
                f"{fingerprint}. Use the base it was trained on ({self.config.get('base_model_name_or_path')})."
            )

    def scaling(self, module: str) -> float:
        """``α/R`` of one linear (``α/√R`` with rsLoRA), rank and alpha patterns applied as PEFT does."""
        rank = self.rank(module)
        alpha = self._patterned("alpha_pattern", module, self.config["lora_alpha"])
        return alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank

    def rank(self, module: str) -> int:
        return self._patterned("rank_pattern", module, self.config["r"])

    def _patterned(self, name: str, module: str, default: int) -> int:
        patterns = self.config.get(name) or {}
        key = matching_pattern(patterns, self.keys.get(module, module))
        return default if key is None else patterns[key]

    def check_fits(self, base_modules: dict[str, QuantizedModule]) -> None:
        """Refuse an adapter whose modules, rank or group count are not those of its config and base."""
        for name in self.modules:
            spec = base_modules.get(name)
            if spec is None:
                raise QALoraError(f"{self.folder} adapts {name}, which the base does not quantise. Use its own base.")
            rank = self.rank(name)
            for part, expected in (("A", (rank, spec.groups)), ("B", (spec.out_features, rank))):
                found = self.tensors[self._key(name, part)].shape
                if found != expected:
                    raise QALoraError(
                        f"{self.folder}: lora_{part} of {name} is {found}, expected {expected} (rank {rank}, "
                        f"{spec.groups} groups of {spec.group_size}). The adapter belongs to a base with another group "
                        "size, or its config was edited."
                    )

    def factors(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A ``[R, G]`` and B ``[N, R]`` of one linear, as stored (bfloat16 as float32)."""
        lora_a, lora_b = (read_array(self.folder, self.tensors[self._key(module, part)]) for part in "AB")
        if not (all_finite(lora_a) and all_finite(lora_b)):
            raise QALoraError(f"{self.folder}: the adapter of {module} holds NaN or Inf. The training diverged.")
        return lora_a, lora_b

    def _key(self, module: str, part: str) -> str:
        return f"base_model.model.{self.keys[module]}.lora_{part}.weight"


def matching_pattern(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that matches the end of a module's name, from a dot on. (PEFT's rule, without its import.)"""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)
