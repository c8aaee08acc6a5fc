"""A saved adapter, opened without the model: what merge and verify need from it."""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from qalora_plugin.checkpoint.adapter_config import (
    Ratios,
    check_config,
    check_config_patterns,
    check_pooling,
    rank_of,
    require_base,
    scaling_of,
)
from qalora_plugin.checkpoint.folder import INDEX_NAME, SINGLE_NAME
from qalora_plugin.checkpoint.hub import expanded
from qalora_plugin.checkpoint.json_files import read_json, short
from qalora_plugin.checkpoint.module_names import stored_name
from qalora_plugin.checkpoint.tensors import TensorInfo, all_finite, read_array, read_header
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.weight import GroupwiseSpec

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_TYPE = "QALORA"
LINEARS = "linears"  # in the config: of how many modules an adapter is, so that none is left out of it unseen
_MOST_EXPERTS = 1 << 13  # of a layer
_FLOATS = ("F16", "BF16", "F32", "F64")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[ABCD])\.weight")


def is_adapter_folder(folder: Path) -> bool:
    """Whether it holds an adapter and no model's weights; training runs put a config.json beside adapters."""
    weights = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    return (folder / CONFIG_NAME).is_file() and not weights


@dataclass
class AdapterFolder:
    """Config and tensor names of one adapter of ours.

    Attributes:
        folder: where it lies.
        config: content of ``adapter_config.json``.
        keys: the adapted linears, name in the base checkpoint → name in the model that was trained, which the file's
            names are made of. Experts, which are one module in the model, are a linear each.
        experts: the number of those linears that are experts.
        tensors: what the weights file holds, by the file's own names.
    """

    folder: Path
    config: dict
    keys: dict[str, str]
    experts: dict[str, int]
    tensors: dict[str, TensorInfo]

    @classmethod
    @os_errors_in_one_line()
    def open(cls, folder: str | Path) -> "AdapterFolder":
        """
        Raises:
            QALoraError: no adapter, not one of ours, pickled, incomplete or damaged.
        """
        folder = expanded(folder)
        if not folder.is_dir():
            raise QALoraError(f"the adapter folder {folder} does not exist. Pass the training run's output folder.")
        if not (folder / CONFIG_NAME).is_file():
            raise QALoraError(
                f"{folder} has no {CONFIG_NAME}: it is no adapter. Pass the training run's output folder."
            )
        config = read_json(folder / CONFIG_NAME)
        if config.get("peft_type") != PEFT_TYPE:
            pooled, advice, peft_type = "", "Train with `adapter: qalora`.", config.get("peft_type")
            if config.get("use_qalora"):
                pooled = " with use_qalora, which pools sum·K/g² instead of the sum"
                advice = "Import it, nothing is lost: qalora import peft ADAPTER OUT."
            kind = f"a PEFT {_plain(peft_type)} adapter" if peft_type else "an adapter without peft_type"
            raise QALoraError(
                f"{folder} is {kind}{pooled}; expected a QA-LoRA adapter of this project (peft_type {PEFT_TYPE}). "
                f"Merging it would scale it wrongly. {advice}"
            )
        return cls.of(folder, config)

    @classmethod
    @os_errors_in_one_line()
    def of(cls, folder: Path, config: dict) -> "AdapterFolder":
        """The weights in ``folder`` under a config that may be another than lies there: how importers read them.

        Raises:
            QALoraError: as :meth:`open`.
        """
        check_config(config, folder / CONFIG_NAME)
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
            if tensors[key].dtype not in _FLOATS:
                raise QALoraError(
                    f"{folder / WEIGHTS_NAME}: {key} is {tensors[key].dtype}, expected a float type. Save it again."
                )
            found.setdefault(match["module"], set()).add(match["part"])
        wanted = _parts(config)
        half = [module for module, parts in found.items() if not parts.issuperset(wanted)]
        if half or not found:
            raise QALoraError(
                f"{folder / WEIGHTS_NAME} lacks {' or '.join(wanted)} of {half[0] if half else 'every layer'}. Save it "
                "again."
            )
        if stray := next((module for module, parts in found.items() if len(parts) > len(wanted)), None):
            raise QALoraError(
                f"{folder / WEIGHTS_NAME} holds trained scales of {stray}, but {CONFIG_NAME} does not say so. They do "
                "not belong together: save the adapter again."
            )
        if (recorded := config.get(LINEARS)) not in (None, len(found)):
            raise QALoraError(
                f"{folder / WEIGHTS_NAME} holds the adapters of {len(found)} modules, but {short(recorded)} were "
                "trained. It is incomplete or was edited: save it again."
            )
        check_config_patterns(config, sorted(found), folder / CONFIG_NAME)
        prefixes = config["qalora"].get("names") or {}
        if not isinstance(prefixes, dict) or not all(isinstance(part, str) for part in prefixes.values()):
            raise QALoraError(f"{folder / CONFIG_NAME}: qalora.names is no mapping of names to names. Save it again.")
        keys: dict[str, str] = {}
        experts: dict[str, int] = {}
        linears = 0
        for module in sorted(found):
            shapes = {part: tensors[f"base_model.model.{module}.lora_{part}.weight"].shape for part in wanted}
            shared_a = bool(config.get("shared_a"))
            names = _stored_names(stored_name(module, prefixes), shapes, shared_a, folder / WEIGHTS_NAME)
            keys |= dict.fromkeys(names, module)
            experts |= {name: number for name, number in names.items() if number is not None}
            linears += len(names)
        if len(keys) < linears:
            raise QALoraError(f"{folder / CONFIG_NAME}: qalora.names gives two linears one name. Save it again.")
        return cls(folder, config, dict(sorted(keys.items())), experts, tensors)

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

    @property
    def has_scales(self) -> bool:
        """Whether scales were trained beside the offsets."""
        return bool(self.config["qalora"].get("scales"))

    @os_errors_in_one_line()
    def digest(self) -> str:
        """``"blake3:…"`` of what a merge takes from this folder: the weights file, and the scaling of each linear."""
        with open(self.folder / WEIGHTS_NAME, "rb") as file:
            weights = hashlib.file_digest(file, blake3).hexdigest()  # type: ignore[arg-type]  # typeshed: hashlib's own only
        scalings = [(module, self.scaling(module)) for module in self.modules]
        ratios = [*self._ratios] if self.has_scales else []
        return f"blake3:{blake3(json.dumps([weights, scalings, *ratios]).encode()).hexdigest()}"

    def require_base(self, fingerprint: str, base: str | Path) -> None:
        """Refuse a base other than the one trained on."""
        require_base(self.config, self.folder, fingerprint, base)

    def scaling(self, module: str) -> float:
        """``α/R`` of one linear (``α/√R`` with rsLoRA), rank and alpha patterns applied as PEFT does."""
        return scaling_of(self.config, self.keys.get(module, module))

    def rank(self, module: str) -> int:
        return rank_of(self.config, self.keys.get(module, module))

    def check_fits(self, base_modules: dict[str, GroupwiseSpec]) -> None:
        """Refuse an adapter whose modules, rank or group count are not those of its config and base."""
        for name in self.modules:
            spec = base_modules.get(name)
            if spec is None:
                raise QALoraError(f"{self.folder} adapts {name}, which the base does not quantise. Use its own base.")
            if (number := self.experts.get(name)) is not None:
                parent, _, leaf = name.rpartition(".")
                another = f"{parent.rpartition('.')[0]}.{number + 1}.{leaf}"
                if another in base_modules and another not in self.keys:
                    raise QALoraError(
                        f"{self.folder} adapts {number + 1} experts as {name}, but the base has {another}, too. The "
                        "adapter is another base's, or was edited: use its own base."
                    )
            rank = self.rank(name)
            shapes = {"A": (rank, spec.groups), "B": (spec.out_features, rank)}
            if self.has_scales:
                shapes |= {"D": (spec.groups, rank), "C": (rank, spec.out_features)}
            for part, expected in shapes.items():
                found = self._info(name, part).shape
                if found != expected:
                    raise QALoraError(
                        f"{self.folder}: lora_{part} of {name} is {found}, expected {expected} (rank {rank}, "
                        f"{spec.groups} groups of {spec.group_size}). The adapter belongs to a base with another group "
                        "size, or its config was edited."
                    )

    def check_values(self) -> None:
        """Refuse NaN and Inf, of which a model would only say that its loss is NaN. Reads all of the adapter."""
        for module in self.modules:
            for part in _parts(self.config):
                self._read(module, part)

    def factors(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A ``[R, G]`` and B ``[N, R]`` of one linear, as stored (bfloat16 as float32).

        Where scales were trained, too, their product is in units of these, in float64 here; what is stored of every
        factor is divided by its ratio (:class:`~.adapter_config.Ratios`).
        """
        return self._factor(module, "A"), self._factor(module, "B")

    def scale_factors(self, module: str) -> tuple[np.ndarray, np.ndarray] | None:
        """D ``[G, R]`` and C ``[R, N]`` of one linear, float64; None where no scales were trained."""
        return (self._factor(module, "D"), self._factor(module, "C")) if self.has_scales else None

    @property
    def _ratios(self) -> Ratios:
        return Ratios.of(self.config["qalora"])

    def _factor(self, module: str, part: str) -> np.ndarray:
        found = self._read(module, part)
        return self._ratios.of_factor(part) * found.astype(np.float64) if self.has_scales else found

    def _read(self, module: str, part: str) -> np.ndarray:
        found = read_array(self.folder, self._info(module, part))
        if not all_finite(found):
            raise QALoraError(f"{self.folder}: the adapter of {module} holds NaN or Inf. The training diverged.")
        return found

    def _info(self, module: str, part: str) -> TensorInfo:
        """Where A or B of one linear lies: of an expert, within the stacked tensor."""
        info, number = (
            self.tensors[f"base_model.model.{self.keys[module]}.lora_{part}.weight"],
            self.experts.get(module),
        )
        if number is None or len(info.shape) == 2:  # one A for all experts
            return info
        size = (info.end - info.start) // info.shape[0]
        start = info.start + number * size
        return replace(info, shape=info.shape[1:], start=start, end=start + size)


def _parts(config: dict) -> str:
    """The factors of a linear's adapter."""
    return "ABCD" if config["qalora"].get("scales") else "AB"


def _stored_names(name: str, shapes: dict[str, tuple[int, ...]], shared_a: bool, path: Path) -> dict[str, int | None]:
    """The linears on disk that a module's factors are for, and which expert each is: one, unless B is stacked.

    Args:
        shapes: of A, B and, where scales were trained, D and C. shared_a: A is one for all experts.
    """
    if len(shapes["B"]) < 3:
        return {name: None}
    experts, stacks = shapes["B"][0], [shape for part, shape in shapes.items() if part != "A" or not shared_a]
    if (
        (shared_a and len(shapes["A"]) != 2)
        or experts > _MOST_EXPERTS
        or any(len(shape) != 3 or shape[0] != experts or 0 in shape for shape in stacks)
    ):
        found = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise QALoraError(
            f"{path}: {found} of {name} are not those of a layer's experts. The adapter is damaged or was edited: save "
            "it again."
        )
    parent, _, leaf = name.rpartition(".")
    return {f"{parent}.{i}.{leaf}": i for i in range(experts)}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else short(value)
