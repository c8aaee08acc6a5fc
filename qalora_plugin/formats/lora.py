"""A QA-LoRA adapter as an ordinary PEFT LoRA, for servers that hold many adapters over one base, unmerged.

    P(x)·Aᵀ = x·A_fullᵀ      A_full[r, k] = A[r, group of column k]      A [R, G], A_full [R, K]

Exact: repeating A along the input is the pooling. B, the rank and alpha stay as they are.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..adapter_folder import CONFIG_NAME, WEIGHTS_NAME, AdapterFolder
from ..atomic import new_folder, require_absent, require_space
from ..errors import QALoraError
from ..quant.checkpoint import Checkpoint
from ..quant.fingerprint import fingerprint
from ..quant.modules import column_groups, require_base

_OURS = ("qalora", "qalora_group_size", "use_qalora", "exclude_modules")


@dataclass
class ExportResult:
    """What :func:`export_lora` wrote.

    Attributes:
        folder: the PEFT folder. modules: adapted linears. max_rank: the largest rank among them, for
            ``vllm serve --max-lora-rank``.
    """

    folder: Path
    modules: int
    max_rank: int


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
        QALoraError: not an adapter of ours, another base, no base to be found, or ``out`` exists.
    """
    out = Path(out).expanduser()
    require_absent(out)
    opened = AdapterFolder.open(adapter)
    base = base or opened.config.get("base_model_name_or_path")
    if not base:
        raise QALoraError(f"the adapter {opened.folder} does not name its base. Pass it: --base BASE.")
    checkpoint = Checkpoint.open(base, revision)
    modules = require_base(checkpoint)
    opened.require_base(fingerprint(checkpoint), base)
    opened.check_fits(modules)

    tensors = {}
    for name in opened.modules:
        lora_a, lora_b = opened.factors(name)
        lora_a = np.ascontiguousarray(lora_a[:, column_groups(checkpoint, modules[name])])
        key = f"base_model.model.{opened.keys[name]}.lora"
        tensors |= {f"{key}_A.weight": lora_a, f"{key}_B.weight": lora_b}
    require_space(_existing(out.parent), sum(tensor.nbytes for tensor in tensors.values()) + (1 << 20))
    config = {key: value for key, value in opened.config.items() if key not in _OURS}
    config |= {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": list(opened.keys.values())}
    with new_folder(out) as work:
        save_file(tensors, work / WEIGHTS_NAME, metadata={"format": "pt"})
        (work / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return ExportResult(out, len(opened.modules), max(map(opened.rank, opened.modules)))


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
