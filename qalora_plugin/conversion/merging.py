"""Adapter + base → merged INT4 checkpoint. One addition, nothing re-quantized, the model is never loaded.

The base's shards are linked (or copied) unchanged; the adapter becomes ``<module>.offsets`` [G, N] in files of its own:
``w' = scales·(q − zeros) + offsets``, added to what the base has already; or, where that is smaller, two factors whose
product they are (:mod:`qalora_plugin.formats.qalora`). Trained scales become ``<module>.scales_delta`` [G, N] likewise,
``scales ⊙ D·C``, where the scales are those that were trained on. At any model size it takes the memory of two shards
of offsets: one is computed while the other is written.
"""

import logging
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.atomic import link_or_copy, new_folder, require_space, same_disk
from qalora_plugin.checkpoint.companions import carry_special_tokens, copy_companions
from qalora_plugin.checkpoint.fingerprint import Identity, identity, is_sampled, keep_remembering
from qalora_plugin.checkpoint.folder import SINGLE_NAME, Checkpoint
from qalora_plugin.checkpoint.json_files import read_json
from qalora_plugin.checkpoint.places import require_place
from qalora_plugin.conversion.added import added, added_bytes, merged_specs, share_lost, usual_dtype
from qalora_plugin.conversion.card import model_card
from qalora_plugin.conversion.gptq_config import gptq_config
from qalora_plugin.conversion.strength import PICTURE_NAME, picture, strengths
from qalora_plugin.conversion.writer import ShardWriter, write_config, write_index
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.progress import track
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.gptq import MERGED
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.provenance import provenance
from qalora_plugin.formats.qalora import AUTO, MERGED_PARTS, OFFSET_DTYPES, OFFSETS, QALora, require_offset_dtype
from qalora_plugin.formats.served_bits import SizeReport, served_bits

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
MOST_LOST = 1e-3  # of what the adapter adds, in the Euclidean norm; float16 rounds to 2e-4
_MOST_ESTIMATED = MOST_LOST / 2  # from a sample
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
    """What a merge wrote: the folder, how many linears it changed, bytes that are new, whether shards were linked, of
    how many linears the offsets are factored, and what all quantized linears take now."""

    folder: Path
    modules: int
    new_bytes: int
    linked: bool
    factored: int
    served: SizeReport

    def summary(self) -> list[str]:
        """Lines for a terminal."""
        new = f"{self.new_bytes / 1e6:.1f} MB new, base shards {'linked' if self.linked else 'copied'}"
        offsets = f", offsets of {self.factored} factored" if self.factored else ""
        return [
            f"{self.folder}: {self.modules} linears merged{offsets}, {new}",
            f"served bits: {self.served}",
        ]


@os_errors_in_one_line()
def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    offset_dtype: str | None = None,
    copy: bool = False,
    revision: str | None = None,
    progress: bool = True,
    offsets: str = AUTO,
) -> MergeResult:
    """Merge a QA-LoRA adapter into its base, checkpoint to checkpoint.

    Args:
        base: folder or Hub id of the base that the adapter was trained on: GPTQ, or one of ours with offsets.
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: the new folder; complete or absent, whatever happens.
        offset_dtype: ``"float16"`` (error 0.03 % of the adapter's own contribution) or ``"float32"``, of offsets and
            changes of scales; default: float16, and float32 where the base has any already, or the adapter is too small
            for float16.
        copy: copy the base's shards even where they could be hard-linked.
        offsets: ``"auto"``, which factors the offsets of every linear where that takes fewer bytes; ``"dense"``, which
            versions of this package before format_version 3 can read; or ``"factored"``.

    Raises:
        QALoraError: anything that would make the result wrong; nothing is written then.
    """
    require_offset_dtype(offset_dtype)
    out = require_place(out, base, "the output")
    source, opened = QuantizedCheckpoint.open(base, revision), AdapterFolder.open(adapter)
    files = source.files
    shards = {file: identity(files.folder / file) for file in files.files}
    if reason := source.why_not_servable():
        logger.warning("%s: %s", base, reason)
    with ThreadPoolExecutor(1) as worker:
        hashing = worker.submit(source.fingerprint)
        source.check_values()
    base_fingerprint = hashing.result()
    recorded = opened.base_fingerprint
    opened.require_base(source.fingerprint(recorded) if is_sampled(recorded) else base_fingerprint, base)
    opened.check_fits(source.specs)

    offset_dtype = offset_dtype or default_offset_dtype(source, opened, offsets)
    specs = merged_specs(source, opened, offset_dtype, offsets)
    new_bytes = sum(map(added_bytes, specs.values()))
    kept = _kept_files(files)
    out.parent.mkdir(parents=True, exist_ok=True)
    linked = bool(kept) and not copy and same_disk(files.folder / files.files[0], out.parent)
    rewritten = sum(info.end - info.start for info in files.tensors.values() if info.file not in kept)
    require_space(out.parent, new_bytes + (rewritten if linked else files.nbytes) + (16 << 20))

    with new_folder(out, flush=linked) as work:  # to wait for copies would take twice their time
        for file, name in kept.items():
            linked = link_or_copy(files.folder / file, work / name, copy) and linked
        weight_map = {tensor: kept[info.file] for tensor, info in files.tensors.items() if info.file in kept}
        weight_map |= _write_rest(work, files, set(files.files) - set(kept), set(kept.values()))
        writer = ShardWriter(work, "offsets", SHARD_BYTES, taken=set(kept.values()))
        written = _write_added(writer, source, opened, specs, progress)
        new_bytes = writer.nbytes
        old = sum(info.end - info.start for name, info in files.tensors.items() if name.endswith(MERGED_PARTS))
        write_index(work, weight_map | written, files.nbytes - old + new_bytes)
        quantization = _quantization_config(source) | {
            "offset_dtype": offset_dtype,
            "base_model": str(base),
            "base_fingerprint": base_fingerprint,
            "adapter": opened.digest(),
        }
        write_config(work, files.config, quantization, written)
        copy_companions(files.folder, opened.folder, work)
        carry_special_tokens(files.folder, work)
        (work / PICTURE_NAME).write_text(picture(strengths(source, opened)), encoding="utf-8")
        factored = sum(specs[name].offset_rank > 0 for name in opened.modules)
        served = served_bits(specs.values(), source.act_order)
        card = model_card(
            out.name, files.config, quantization, opened, new_bytes, files.nbytes, specs.values(), served, factored
        )
        (work / "README.md").write_text(card, encoding="utf-8")
        QuantizedCheckpoint.open(work)  # what could not be opened is no merge
        _require_unchanged(files, shards)
    logger.info("merged %d linears into %s (%.1f MB new)", len(opened.modules), out, new_bytes / 1e6)
    return MergeResult(out, len(opened.modules), new_bytes, linked, factored, served)


def default_offset_dtype(base: QuantizedCheckpoint, adapter: AdapterFolder, form: str = AUTO) -> str:
    """float16, or float32 where the base has offsets or changed scales already: rounding those could outweigh what the
    adapter adds; or where the adapter is so small that float16 would lose more of it than ``qalora verify`` lets pass.
    """
    usual = usual_dtype(base.specs.values())
    too_few = usual == "float16" and share_lost(base, adapter, usual, form) > _MOST_ESTIMATED
    return "float32" if too_few else usual


def _kept_files(files: Checkpoint) -> dict[str, str]:
    """Shards that the merge takes as they are → their names in it: all but those that hold what merges wrote."""
    changed = {info.file for name, info in files.tensors.items() if name.endswith(MERGED_PARTS)}
    renamed = {SINGLE_NAME: "model-00001-of-00001.safetensors"}  # beside an index, transformers would prefer the single
    return {file: renamed.get(file, file) for file in files.files if file not in changed}


def _write_rest(work: Path, files: Checkpoint, changed: set[str], taken: set[str]) -> dict[str, str]:
    """Copy what else lies in files with what merges wrote (none in those that we write); returns its weight map."""
    rest = [name for name, info in files.tensors.items() if info.file in changed and not name.endswith(MERGED_PARTS)]
    writer = ShardWriter(work, "rest", taken=taken)
    for name in rest:
        writer.add(name, files.tensor(name))
    return writer.finish()


def _require_unchanged(checkpoint: Checkpoint, shards: dict[str, Identity]) -> None:
    """Refuse to finish if a shard was written to, or exchanged, since it was opened (links to it are no change)."""
    for file, before in shards.items():
        path = checkpoint.folder / file
        if identity(path)[:4] != before[:4]:
            raise QALoraError(
                f"{path} was changed while it was being merged. Wait until it is complete, and try again."
            )
        keep_remembering(path, before)


@os_errors_in_one_line()
def is_merge_of(
    folder: str | Path, base: str | Path, adapter: str | Path, offset_dtype: str | None, revision: str | None = None
) -> bool:
    """True if ``folder`` is already the merge of exactly this adapter into exactly this base, with such offsets.

    Args:
        offset_dtype: None for whatever was chosen when it was made.

    Raises:
        QALoraError: it is, but damaged (a power failure soon after merging can cut copied shards short).
    """
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    recorded = read_json(config).get("quantization_config")
    if not isinstance(recorded, dict) or recorded.get("adapter") != AdapterFolder.open(adapter).digest():
        return False
    source = QuantizedCheckpoint.open(base, revision)
    return (
        recorded.get("offset_dtype") in ((offset_dtype,) if offset_dtype else OFFSET_DTYPES)
        and recorded.get("base_fingerprint") == source.fingerprint()
        and Checkpoint.open(folder).method == QALora.method
    )


def _write_added(
    writer: ShardWriter,
    base: QuantizedCheckpoint,
    adapter: AdapterFolder,
    specs: dict[str, GroupwiseSpec],
    progress: bool,
) -> dict[str, str]:
    """Write the files of offsets and changes of scales; returns their part of the weight map."""
    wanted, lost, suffering = defaultdict[str, float](float), defaultdict[str, float](float), 0
    count = len(adapter.modules) * (2 if adapter.has_scales else 1)
    steps = added(base, adapter, specs, SHARD_BYTES)
    for one in track(steps, "merging", count, shown=progress):
        for name, tensor in one.tensors.items():
            writer.add(name, tensor)
        wanted[one.part] += one.wanted
        lost[one.part] += one.lost
        suffering += one.lost > MOST_LOST**2 * one.wanted
    replaced = MERGED if adapter.has_scales else OFFSETS
    for name, spec in base.specs.items():
        for part in base.format.parts(spec):
            if part in MERGED and (name not in adapter.keys or part not in replaced):
                stored = f"{name}.{part}"
                is_bfloat16 = base.files.tensors[stored].dtype == "BF16"
                writer.add(stored, (base.files.tensor if is_bfloat16 else base.files.array)(stored))
    if suffering:
        share = max((lost[part] / wanted[part] for part in wanted if wanted[part]), default=float("inf"))
        logger.warning(
            "qalora: %d of %d adapted linears are so small that %s loses more than %.1g of what the adapter adds to "
            "them (%.2g of the whole adapter, in the Euclidean norm). Merge with offset_dtype float32.",
            suffering, count, specs[adapter.modules[0]].offset_dtype, MOST_LOST, share**0.5,
        )  # fmt: skip
    return writer.finish()


def _quantization_config(base: QuantizedCheckpoint) -> dict:
    """The base's quantization, as its tensors show it where configs are known to err (``sym``, ``desc_act``)."""
    stated, specs = base.files.quantization, base.specs.values()
    settings: dict[str, Any] = {
        "bits": Counter(spec.bits for spec in specs).most_common(1)[0][0],  # if the base names none
        "group_size": Counter(spec.group_size for spec in specs).most_common(1)[0][0],
        **{key: stated[key] for key in _KEPT_KEYS if stated.get(key) is not None},
    }
    kinds = {(spec.bits, -1 if spec.groups == 1 else spec.group_size) for spec in specs}
    if len(kinds) > 1 and not stated.get("dynamic"):  # said in words of another tool's, as AutoRound's extra_config
        found = gptq_config(base.files, base.specs, base.format.reading, base.symmetric)
        settings |= {key: found[key] for key in ("bits", "group_size", "dynamic") if key in found}
    return {
        **settings,
        "desc_act": base.act_order,
        "sym": base.symmetric,
        "checkpoint_format": base.format.reading,
        **provenance(stated),
    }
