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

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_TYPE = "QALORA"
ADAPTER_FORMAT = 1
POOLING = "sum"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight")


def check_pooling(qalora: dict, what: str) -> None:
    """Refuse an adapter that this version would scale wrongly."""
    if not qalora:
        raise QALoraError(f"{what} does not say how it pools (its config has no `qalora`). Save it again with qalora.")
    if qalora.get("format_version") != ADAPTER_FORMAT:
        raise QALoraError(
            f"{what} has format_version {qalora.get('format_version')!r}, this version of qalora reads "
            f"{ADAPTER_FORMAT}. Update qalora, or train it with this version."
        )
    if qalora.get("pooling") != POOLING:
        raise QALoraError(
            f"{what} has pooling {qalora.get('pooling')!r}, expected {POOLING!r}: it would be scaled wrongly. "
            "Train it with this version of qalora."
        )


@dataclass
class AdapterFolder:
    """Config and tensor names of one adapter of ours.

    Attributes:
        folder: where it lies.
        config: content of ``adapter_config.json``.
        modules: names of the adapted linears, in the base checkpoint's naming.
        tensors: what the weights file holds, by the file's own names.
    """

    folder: Path
    config: dict
    modules: list[str]
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
            kind = (
                f"a PEFT {config['peft_type']} adapter" if config.get("peft_type") else "an adapter without peft_type"
            )
            raise QALoraError(
                f"{folder} is {kind}{pooled}; expected a QA-LoRA adapter of this "
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
        return cls(folder, config, sorted(found), tensors)

    @property
    def base_fingerprint(self) -> str | None:
        return self.config["qalora"].get("base_fingerprint")

    def digest(self) -> str:
        """``"sha256:…"`` of the adapter's weights file."""
        with open(self.folder / WEIGHTS_NAME, "rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

    def require_base(self, fingerprint: str, base: str | Path) -> None:
        """Refuse a base other than the one trained on."""
        if not self.base_fingerprint:
            raise QALoraError(
                f"the adapter {self.folder} does not record its base (its config has no base_fingerprint), so nothing "
                "says whether this is the one. Save it again with the version of qalora that trained it."
            )
        if self.base_fingerprint != fingerprint:
            trained_on = self.config.get("base_model_name_or_path")
            raise QALoraError(
                f"the adapter {self.folder} was trained on another base: it records {self.base_fingerprint}, {base} is "
                f"{fingerprint}. Use the base it was trained on{f' ({trained_on})' if trained_on else ''}."
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
        key = matching_pattern(patterns, module)
        return default if key is None else patterns[key]

    def check_fits(self, base_modules: dict[str, QuantizedModule]) -> None:
        """Refuse an adapter whose modules, rank or group count are not those of its config and base."""
        for name in self.modules:
            spec = base_modules.get(name)
            if spec is None:
                raise QALoraError(f"{self.folder} adapts {name}, which the base does not quantise. Use its own base.")
            rank = self.rank(name)
            for part, expected in (("A", (rank, spec.groups)), ("B", (spec.out_features, rank))):
                found = self.tensors[_key(name, part)].shape
                if found != expected:
                    raise QALoraError(
                        f"{self.folder}: lora_{part} of {name} is {found}, expected {expected} (rank {rank}, "
                        f"{spec.groups} groups of {spec.group_size}). The adapter belongs to a base with another group "
                        "size, or its config was edited."
                    )

    def factors(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A ``[R, G]`` and B ``[N, R]`` of one linear, as stored (bfloat16 as float32)."""
        lora_a, lora_b = (read_array(self.folder, self.tensors[_key(module, part)]) for part in "AB")
        if not (all_finite(lora_a) and all_finite(lora_b)):
            raise QALoraError(f"{self.folder}: the adapter of {module} holds NaN or Inf. The training diverged.")
        return lora_a, lora_b


def matching_pattern(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that matches the end of a module's name, from a dot on. (PEFT's rule, without its import.)"""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


def _key(module: str, part: str) -> str:
    return f"base_model.model.{module}.lora_{part}.weight"
