"""Adapter + GPTQ base → merged INT4 checkpoint. One addition, nothing re-quantised, the model is never loaded.

The base's shards are linked (or copied) unchanged; the adapter becomes ``<module>.offsets`` [G, N] in files of its own:
``w' = scales·(q − zeros) + offsets``. Memory is one linear's offsets plus one shard of them, at any model size.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file

from .adapter_folder import AdapterFolder
from .atomic import link_or_copy, new_folder, require_absent, require_space, same_disk
from .card import model_card
from .companions import carry_special_tokens, copy_companions
from .errors import QALoraError
from .quant.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_json, write_json
from .quant.fingerprint import fingerprint
from .quant.modules import (
    FORMAT_VERSION,
    MERGED_METHOD,
    QuantizedModule,
    all_finite,
    check_values,
    checkpoint_format,
    is_act_order,
    is_symmetric,
    require_base,
)

logger = logging.getLogger(__name__)

OFFSET_DTYPES = {"float16": torch.float16, "float32": torch.float32}
SHARD_BYTES = 64 << 20
_KEPT_KEYS = (
    "bits",
    "group_size",
    "desc_act",
    "lm_head",
    "modules_to_not_convert",
    "modules_in_block_to_quantize",
    "dynamic",
)


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote: the folder, how many linears got offsets, bytes that are new, whether shards were linked."""

    folder: Path
    modules: int
    new_bytes: int
    linked: bool


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    offset_dtype: str = "float16",
    copy: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> MergeResult:
    """Merge a QA-LoRA adapter into its GPTQ base, checkpoint to checkpoint.

    Args:
        base: folder or Hub id of the base that the adapter was trained on.
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: the new folder; complete or absent, whatever happens.
        offset_dtype: ``"float16"`` (error 0.03 % of the adapter's own contribution) or ``"float32"``.
        copy: copy the base's shards even where they could be hard-linked.

    Raises:
        QALoraError: anything that would make the result wrong; nothing is written then.
    """
    require_offset_dtype(offset_dtype)
    out = Path(out).expanduser().absolute()
    require_absent(out)
    checkpoint, opened = Checkpoint.open(base, revision), AdapterFolder.open(adapter)
    modules = require_base(checkpoint)
    check_values(checkpoint, modules)
    opened.require_base(base_fingerprint := fingerprint(checkpoint), base)
    opened.check_fits(modules)

    dtype = OFFSET_DTYPES[offset_dtype]
    shards = _plan_shards({name: modules[name] for name in opened.modules}, dtype.itemsize)
    new_bytes = sum(modules[name].groups * modules[name].out_features * dtype.itemsize for name in opened.modules)
    out.parent.mkdir(parents=True, exist_ok=True)
    linked = not copy and same_disk(checkpoint.folder / checkpoint.files[0], out.parent)
    require_space(out.parent, new_bytes + (0 if linked else checkpoint.nbytes) + (16 << 20))

    with new_folder(out) as work:
        names = {file: "model-00001-of-00001.safetensors" if file == SINGLE_NAME else file for file in checkpoint.files}
        for file, name in names.items():
            linked = link_or_copy(checkpoint.folder / file, work / name, copy) and linked
        weight_map = {tensor: names[info.file] for tensor, info in checkpoint.tensors.items()}
        weight_map |= _write_offsets(work, opened, shards, dtype, progress)
        write_json(
            work / INDEX_NAME, {"metadata": {"total_size": checkpoint.nbytes + new_bytes}, "weight_map": weight_map}
        )
        copy_companions(checkpoint.folder, opened.folder, work)
        quantization = _quantization_config(checkpoint, modules) | {
            "offset_dtype": offset_dtype,
            "base_model": str(base),
            "base_fingerprint": base_fingerprint,
            "adapter": opened.digest(),
            "format_version": FORMAT_VERSION,
        }
        write_json(work / "config.json", checkpoint.config | {"quantization_config": quantization})
        carry_special_tokens(checkpoint.folder, work)
        (work / "README.md").write_text(model_card(out.name, quantization, opened, new_bytes, checkpoint.nbytes))
    logger.info("merged %d linears into %s (%.1f MB new)", len(opened.modules), out, new_bytes / 1e6)
    return MergeResult(out, len(opened.modules), new_bytes, linked)


def require_offset_dtype(name: str) -> None:
    """Refuse what :func:`merge` cannot store offsets as."""
    if name not in OFFSET_DTYPES:
        raise QALoraError(f"offset_dtype is {name!r}, expected one of {', '.join(OFFSET_DTYPES)}.")


def is_merge_of(
    folder: str | Path, base: str | Path, adapter: str | Path, offset_dtype: str, revision: str | None = None
) -> bool:
    """True if ``folder`` is already the merge of exactly this adapter into exactly this base, with such offsets."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    recorded = read_json(config).get("quantization_config") or {}
    return (
        recorded.get("offset_dtype") == offset_dtype
        and recorded.get("adapter") == AdapterFolder.open(adapter).digest()
        and recorded.get("base_fingerprint") == fingerprint(Checkpoint.open(base, revision))
    )


def _plan_shards(modules: dict[str, QuantizedModule], itemsize: int) -> dict[str, str]:
    """Module → name of the file that will hold its offsets, each file at most ``SHARD_BYTES`` (or one module)."""
    part, used, parts = 0, 0, {}
    for name, module in modules.items():
        size = module.groups * module.out_features * itemsize
        if used and used + size > SHARD_BYTES:
            part, used = part + 1, 0
        used += size
        parts[name] = part
    if part == 0:
        return dict.fromkeys(parts, "offsets.safetensors")
    return {name: f"offsets-{i + 1:05d}-of-{part + 1:05d}.safetensors" for name, i in parts.items()}


def _write_offsets(
    work: Path, adapter: AdapterFolder, shards: dict[str, str], dtype: torch.dtype, progress: bool
) -> dict[str, str]:
    """Write the offset files; returns their part of the weight map."""
    pending, weight_map = {}, {}
    names = list(shards)
    for i, (name, delta) in enumerate(
        track(adapter.offsets(), "merging", total=len(names), disable=not progress, transient=True)
    ):
        stored = delta.to(dtype)
        if not all_finite(stored):
            raise QALoraError(f"the offsets of {name} reach {delta.abs().max():.3g}: use offset_dtype float32.")
        pending[f"{name}.offsets"] = stored.contiguous()
        weight_map[f"{name}.offsets"] = file = shards[name]
        if i + 1 == len(names) or shards[names[i + 1]] != file:
            save_file(pending, work / file, metadata={"format": "pt"})
            pending = {}
    return weight_map


def _quantization_config(checkpoint: Checkpoint, modules: dict[str, QuantizedModule]) -> dict:
    """The base's quantisation, as its tensors show it where configs are known to err (``sym``, ``desc_act``)."""
    base = checkpoint.quantization
    return {
        "quant_method": MERGED_METHOD,
        **{key: base[key] for key in _KEPT_KEYS if base.get(key) is not None},
        "desc_act": any(is_act_order(checkpoint, module) for module in modules.values()),
        "sym": all(is_symmetric(checkpoint, module) for module in modules.values()),
        "checkpoint_format": checkpoint_format(base),
    }
