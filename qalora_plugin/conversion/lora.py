"""A QA-LoRA adapter as an ordinary PEFT LoRA, for servers that hold many adapters over one base, unmerged.

    P(x)·Aᵀ = x·A_fullᵀ      A_full[r, k] = A[r, group of column k]      A [R, G], A_full [R, K]

Exact: repeating A along the input is the pooling. α/R goes into B, and alpha becomes the rank: vLLM up to 0.31 reads
neither rank nor alpha patterns, and takes the one alpha of the config over each adapter's own rank.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qalora_plugin.checkpoint.adapter_config import naming
from qalora_plugin.checkpoint.adapter_folder import CONFIG_NAME, WEIGHTS_NAME, AdapterFolder
from qalora_plugin.checkpoint.atomic import new_folder, require_absent, require_space
from qalora_plugin.checkpoint.places import absolute, require_place
from qalora_plugin.checkpoint.tensors import all_finite
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.formats.opened import QuantizedCheckpoint

# What vLLM 0.32's --max-lora-rank takes (vllm/config/lora.py).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_OURS = ("qalora", "qalora_group_size", "use_qalora", "exclude_modules", "linears", "shared_a")


@dataclass
class ExportResult:
    """What :func:`export_lora` wrote.

    Attributes:
        folder: the PEFT folder. modules: adapted linears. max_rank: the rank of all of them.
    """

    folder: Path
    modules: int
    max_rank: int

    def summary(self) -> list[str]:
        limit = next((rank for rank in _VLLM_RANKS if rank >= self.max_rank), None)
        served = f"serve it with --enable-lora --max-lora-rank {limit} …"
        if limit is None:
            served = (
                f"its rank is {self.max_rank}, and vLLM takes {_VLLM_RANKS[-1]} at most: merge it to serve it there"
            )
        return [f"{self.folder}: {self.modules} linears; {served}"]


@os_errors_in_one_line()
def export_lora(
    adapter: str | Path, out: str | Path, base: str | Path | None = None, revision: str | None = None
) -> ExportResult:
    """Write ``adapter`` as a PEFT LoRA folder that stock PEFT and ``vllm serve BASE --enable-lora`` read.

    Args:
        adapter: folder of the trained adapter.
        out: new folder; complete or absent.
        base: the GPTQ base (folder or Hub id), whose group sizes and act-order are needed; default: the one that the
            adapter names.

    Raises:
        QALoraError: not an adapter of ours, one with trained scales, another base, no base to be found, or ``out``
            exists, lies in the base's folder or cannot be written.
    """
    require_absent(out := absolute(out))
    opened = AdapterFolder.open(adapter)
    if opened.experts:
        raise QALoraError(
            f"the adapter {opened.folder} is on the experts of a mixture-of-experts model ({next(iter(opened.experts))}"
            "), which neither stock PEFT nor vLLM read as a LoRA a linear. Merge it: qalora merge."
        )
    if opened.has_scales:
        raise QALoraError(
            f"the adapter {opened.folder} has trained scales, which multiply the base's weights group by group: no "
            "LoRA can do that. Merge it (qalora merge), or train without scales (qalora: {scales: false})."
        )
    named_by = None if base else opened.folder
    base = base or opened.config.get("base_model_name_or_path")
    if not base:
        raise QALoraError(f"the adapter {opened.folder} does not name its base. Pass it: --base BASE.")
    require_place(out, base, "the output")
    with naming(named_by, "--base BASE"):
        source = QuantizedCheckpoint.open(base, revision)
    source.check_values()
    opened.require_base(source.fingerprint(opened.base_fingerprint), base)
    opened.check_fits(source.specs)

    rank, tensors = max(map(opened.rank, opened.modules)), {}
    for name in opened.modules:
        groups = source.column_groups(name)
        for part, tensor in zip("AB", _full_factors(opened, name, groups, rank), strict=True):
            tensors[f"base_model.model.{opened.keys[name]}.lora_{part}.weight"] = tensor
    require_space(out.parent, sum(tensor.nbytes for tensor in tensors.values()) + (1 << 20))
    config = {key: value for key, value in opened.config.items() if key not in _OURS}
    config |= {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": list(opened.keys.values())}
    config |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    with new_folder(out) as work:
        save_file(tensors, work / WEIGHTS_NAME, metadata={"format": "pt"})
        (work / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return ExportResult(out, len(opened.modules), rank)


def _full_factors(adapter: AdapterFolder, name: str, groups: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A ``[rank, K]`` and B ``[N, rank]``, α/R inside B, filled up with zeros where the linear's rank is smaller."""
    lora_a, lora_b = adapter.factors(name)
    with np.errstate(over="ignore"):
        lora_b = (adapter.scaling(name) * lora_b.astype(np.float64)).astype(np.float32)
    if not all_finite(lora_b):
        raise QALoraError(f"{adapter.folder}: α/R·B of {name} exceeds what float32 can hold. The training diverged.")
    missing = rank - len(lora_a)
    full_a, full_b = np.pad(lora_a[:, groups], ((0, missing), (0, 0))), np.pad(lora_b, ((0, 0), (0, missing)))
    return np.ascontiguousarray(full_a), np.ascontiguousarray(full_b)  # the writer takes memory as it lies
