"""``quantization_config`` → which linears of a vLLM model are quantised, and how.

Read off the checkpoint's safetensors headers, as training and merging do (``qalora_plugin.formats``): what has
a ``qweight`` is quantised, its shapes give bits and group size. So ``dynamic``, ``modules_to_not_convert`` and a
quantised ``lm_head`` need no rules here.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.transformers_utils.config import get_safetensors_params_metadata

from qalora_plugin.checkpoint.folder import INDEX_NAME
from qalora_plugin.checkpoint.json_files import read_json
from qalora_plugin.checkpoint.tensors import TensorInfo, read_header
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.fusion import class_problem
from qalora_plugin.formats.gptq import Gptq
from qalora_plugin.formats.opened import base_format
from qalora_plugin.formats.qalora import MERGED_PARTS, QALora
from vllm_ext.compat import experts_problem, is_experts, load_every_tensor
from vllm_ext.kernels.select import PATH_KEY, TIMED_KEY, forced_path, timed_path
from vllm_ext.linear import QALoraLinearMethod
from vllm_ext.model_classes import RENAMED, USUAL_PACKING

DRAFT_PREFIX = "draft_model."  # what vLLM puts before every name of a model that drafts for another


@register_quantization_config(QALora.method)
class QALoraConfig(QuantizationConfig):
    """A merged QA-LoRA checkpoint, or (``--quantization qalora``) a plain GPTQ base, symmetric or not.

    Attributes:
        quantization: the checkpoint's ``quantization_config``.
        modules: quantised linears by their name in the vLLM model; filled by :meth:`maybe_update_config`.
        weights: names of the modules that the checkpoint holds a dense weight of; likewise.
        tensors: names of all that it holds → their dimensions. holders: names of the modules that these belong to, and
            of all above them. with_dense: of those that have a dense matrix, or a module with one right below them.
    """

    def __init__(self, quantization: dict[str, Any]):
        super().__init__()
        self.quantization = {"quant_method": Gptq.method, **quantization}
        self.format = _format(self.quantization)
        self.forced_path, self.timed_path = self.quantization.get(PATH_KEY), self.quantization.get(TIMED_KEY)
        self.modules: dict[str, GroupwiseSpec] = {}
        self.weights: set[str] = set()
        self.tensors: dict[str, int] = {}
        self.holders: set[str] = set()
        self.with_dense: set[str] = set()
        self.renamed: dict[str, str] = {}  # parts of tensors' names, before vLLM's own rules

    def __repr__(self) -> str:
        keys = ("quant_method", "bits", "group_size", "desc_act", "sym", "offset_dtype")
        known = {key: self.quantization.get(key) for key in keys}
        return f"QALoraConfig({known}, {len(self.modules)} quantised linears)"

    @classmethod
    def get_name(cls) -> str:
        return QALora.method

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.half, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 60  # vLLM's own GPTQ asks for the same; which kernel runs is decided layer by layer

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return ["quantize_config.json"]  # AutoGPTQ bases whose config.json has no quantization_config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QALoraConfig":
        # Into the model's config, which vLLM's cache of compiled graphs hashes: a graph belongs to its path.
        if path := forced_path(config):
            config[PATH_KEY] = path
        config["serving_code"] = _code_hash()  # and to the code that chose the path
        _format(config)  # refuses a field that is of another type than it should be
        config.pop(TIMED_KEY, None)
        if not path and (timed := timed_path(config, _code_hash())):
            config[TIMED_KEY] = timed
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a plain GPTQ checkpoint only where the user asked for it by ``--quantization qalora``."""
        asked = user_quant == QALora.method and hf_quant_cfg.get("quant_method") == Gptq.method
        return QALora.method if asked else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the headers of the checkpoint (a folder or a Hub id) and hold them against the config.

        Raises:
            QALoraError: another ``format_version``, no, missing or damaged tensors, or a model class that
                cannot take packed weights.
        """
        for name in getattr(hf_config, "architectures", None) or ():
            self.renamed |= RENAMED.get(name, {})
            if reason := class_problem(name):
                raise QALoraError(reason)
        if next(Path(model_name).glob("model-rank-*.safetensors"), None):
            raise QALoraError(
                f"{model_name} was saved by vLLM's save_sharded_state: its tensors are in one kernel's layout. Serve "
                "the merged folder itself."
            )
        index = _index(Path(model_name))
        tensors = _headers(model_name, revision, index)
        if not tensors:
            raise QALoraError(
                f"no safetensors header can be read in {model_name}; they say which linears are quantised, and how. "
                "Check that the download is complete; from object storage (s3://, gs://) download the folder first."
            )
        self.modules = self.format.specs(tensors, model_name)
        self._require_offsets(model_name, index)
        self.modules = {self._rename(name): module for name, module in self.modules.items()}
        self._take_tensors({self._rename(name): len(info.shape) for name, info in tensors.items()})

    def _rename(self, name: str) -> str:
        for part, theirs in self.renamed.items():
            name = name.replace(part, theirs)
        return name

    def _take_tensors(self, tensors: dict[str, int]) -> None:
        self.tensors = tensors
        self.weights = {name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")}
        dense = [name.removesuffix(".weight") for name, dimensions in tensors.items() if dimensions > 1]
        parents = {name.rpartition(".")[0] for name in tensors}
        self.with_dense = {name.rpartition(".")[0] for name in dense} - self.modules.keys()
        self.holders = set()
        while parents:
            self.holders |= parents
            parents = {name.rpartition(".")[0] for name in parents} - self.holders

    def _require_offsets(self, folder: str, index: dict[str, Any]) -> None:
        """Refuse a merged checkpoint whose offsets, or changes of scales, are not there: it would be served as its
        base."""
        if self.quantization["quant_method"] != QALora.method:
            return
        found = {f"{name}.{part}" for name, module in self.modules.items() for part in self.format.parts(module)}
        found = {name for name in found if name.endswith(MERGED_PARTS)}
        missing = [name for name in index if name.endswith(MERGED_PARTS) and name not in found]
        if missing or not found:
            what = missing[0] if missing else "every .offsets tensor"
            raise QALoraError(
                f"{folder} is a merged checkpoint, but {what} is missing: "
                "without it the base would be served. Download the folder again (offsets*.safetensors), or merge again."
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        # As tensors' names: rules may end in a dot ("lm_head." → "language_model.lm_head.").
        modules = hf_to_vllm_mapper.apply_dict({f"{name}.qweight": module for name, module in self.modules.items()})
        self.modules = {name.removesuffix(".qweight"): module for name, module in modules.items()}
        self._take_tensors(hf_to_vllm_mapper.apply_dict(self.tensors))

    def get_checkpoint_weight_mapper(self) -> Any:
        return load_every_tensor(self.renamed)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if is_experts(layer):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        if not prefix and isinstance(layer, ParallelLMHead):
            self._require_dense_head(layer)
        parts, symmetric = self._parts(prefix), self.quantization.get("sym", True)
        guessed = not parts
        if guessed:
            width = layer.embedding_dim if isinstance(layer, ParallelLMHead) else layer.input_size
            parts = self._parts_by_leaf(prefix.removeprefix(DRAFT_PREFIX), width)
        if parts:
            return QALoraLinearMethod(prefix, parts, self.format, self.forced_path, symmetric, self.timed_path, guessed)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _require_dense_head(self, layer: ParallelLMHead) -> None:
        """Some model classes (Afmoe, EXAONE-MoE) build it without a name."""
        if head := next((name for name in self.modules if name.rpartition(".")[2] == "lm_head"), None):
            raise QALoraError(
                f"the checkpoint's {head} is quantised, but this model's class builds its head without a name, so that "
                "vLLM would make it dense. Quantise the base again with lm_head left out, or serve with transformers."
            )

    def _experts_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        prefix = prefix.removeprefix(DRAFT_PREFIX)
        name = prefix.removesuffix(".routed_experts")
        head = name + "."
        found = {name.removeprefix(head): spec for name, spec in self.modules.items() if name.startswith(head)}
        if not found:
            stored = next((name for name in self.modules if ".experts." in name), None)
            if stored and name not in self.holders:
                raise QALoraError(
                    f"the checkpoint's experts are named like {stored}, which vLLM does not find as {prefix}. Serve it "
                    "with transformers, or save the base under the names that vLLM expects."
                )
            return None
        if problem := experts_problem(layer):
            raise QALoraError(f"{prefix}: {problem}")
        from vllm_ext.moe import QALoraMoEMethod  # of the versions that have such layers

        symmetric = self.quantization.get("sym", True)
        return QALoraMoEMethod(
            layer.moe_config, prefix, found, self.format, self.forced_path, self.timed_path, symmetric
        )

    def _parts(self, prefix: str) -> list[GroupwiseSpec]:
        """Checkpoint modules behind a vLLM linear: one, several where vLLM fuses (q, k, v), none if it is dense."""
        prefix = prefix.removeprefix(DRAFT_PREFIX)
        if prefix in self.modules:
            return [self.modules[prefix]]
        parent, packed = prefix.rpartition(".")[0], self._packed(prefix)
        names = [f"{parent}.{part}".lstrip(".") for part in packed]
        found = [name for name in names if name in self.modules]
        if found and any(name in self.weights for name in names):
            raise QALoraError(
                f"vLLM runs {', '.join(names)} as one layer, but the checkpoint quantises only {', '.join(found)}. "
                "Quantise the base again with all of them quantised, or all of them left out."
            )
        # A part that is not stored at all is loaded from another's tensors (Gemma 4: where k is v, from k's).
        return [self.modules.get(name, self.modules[found[-1]]) for name in names if found]

    def _packed(self, prefix: str) -> Sequence[str]:
        """Last names of the checkpoint's modules that vLLM fuses into a layer."""
        leaf = prefix.rpartition(".")[2]
        return self.packed_modules_mapping.get(leaf) or USUAL_PACKING.get(leaf, ())

    def _parts_by_leaf(self, prefix: str, width: int) -> list[GroupwiseSpec]:
        """Parts of a layer that vLLM builds under another name than its tensors have (Falcon-H1's mixers): any that is
        called alike, if the checkpoint has none so called that is dense or quantised differently. None where it holds a
        dense matrix beside the layer: that is it, under another name (GLM's vision towers).

        Args:
            width: of the layer's input.
        """
        parent, _, last = prefix.rpartition(".")
        if not last or prefix in self.weights or (parent and parent in self.with_dense):
            return []
        parts = []
        for leaf in self._packed(prefix) or (last,):
            alike = [module for name, module in self.modules.items() if name.rpartition(".")[2] == leaf]
            kinds = {(part.bits, part.group_size, part.in_features, part.out_features) for part in alike}
            if len(kinds) != 1 or any(name.rpartition(".")[2] == leaf for name in self.weights):
                return []
            parts.append(
                max(
                    alike,
                    key=lambda part: (
                        part.scales_delta_dtype is not None,
                        part.offset_dtype is not None,
                        part.offset_rank,
                    ),
                )
            )
        return parts if {part.in_features for part in parts} == {width} else []


def _format(quantization: dict[str, Any]) -> Gptq:
    return (base_format(quantization) or Gptq)(quantization)  # Gptq refuses what is no format's


def _headers(model: str, revision: str | None, index: dict[str, Any]) -> dict[str, TensorInfo]:
    """What the safetensors files that vLLM loads, of a folder or of a Hub id, say of their tensors."""
    if (folder := Path(model)).is_dir():
        files = {file for file in index.values() if isinstance(file, str)}
        tensors: dict[str, TensorInfo] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if not index or path.name in files:  # others, left by an older download, vLLM leaves alone
                tensors |= read_header(path)
        return tensors
    found = get_safetensors_params_metadata(model, revision=revision)
    return {
        name: TensorInfo("", info["dtype"], tuple(info["shape"])) for name, info in found.items() if "dtype" in info
    }


def _index(folder: Path) -> dict[str, Any]:
    """Tensor → file by the folder's index; empty where it has none."""
    index = folder / INDEX_NAME
    listed = read_json(index).get("weight_map") if index.is_file() else None
    return listed if isinstance(listed, dict) else {}


@cache
def _code_hash() -> str:
    """Of this package's source files."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
