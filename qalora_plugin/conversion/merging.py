"""Adapter + base → merged INT4 checkpoint. One addition, nothing re-quantized, the model is never loaded.

The base's shards are linked (or copied) unchanged; the adapter becomes ``<module>.offsets`` [G, N] in files of its own:
``w' = scales·(q − zeros) + offsets``, added to what the base has already. Trained scales become
``<module>.scales_delta`` [G, N] likewise, ``scales ⊙ D·C``, where the scales are those that were trained on. At any
model size it takes the memory of two shards of offsets: one is computed while the other is written.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.atomic import link_or_copy, new_folder, require_space, same_disk
from qalora_plugin.checkpoint.companions import carry_special_tokens, copy_companions
from qalora_plugin.checkpoint.fingerprint import Identity, identity, is_sampled, keep_remembering
from qalora_plugin.checkpoint.folder import SINGLE_NAME, Checkpoint
from qalora_plugin.checkpoint.json_files import read_json
from qalora_plugin.checkpoint.places import require_place
from qalora_plugin.checkpoint.tensors import all_finite
from qalora_plugin.conversion.card import model_card
from qalora_plugin.conversion.strength import PICTURE_NAME, picture, strengths
from qalora_plugin.conversion.writer import ShardWriter, write_config, write_index
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.folding import fold, fold_workers, squared_norm
from qalora_plugin.formats.fusion import dense_modules, unservable
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.qalora import MERGED_PARTS, QALora, require_offset_dtype

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 << 20
MOST_LOST = 1e-3  # of what the adapter adds, in the Euclidean norm; float16 rounds to 2e-4
_SMALL = 1e-4  # mean square roots below this may suffer in float16, which loses digits below 6e-5
_TOO_LARGE = {"float16": "Use offset_dtype float32", "float32": "The training diverged"}
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
class _Folded:
    """A tensor [G, N] of one linear as stored, the squared norm of what the adapter adds, and of what rounding lost."""

    name: str
    stored: np.ndarray
    wanted: float
    lost: float


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote: the folder, how many linears it changed, bytes that are new, whether shards were linked."""

    folder: Path
    modules: int
    new_bytes: int
    linked: bool


@os_errors_in_one_line()
def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    offset_dtype: str | None = None,
    copy: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> MergeResult:
    """Merge a QA-LoRA adapter into its base, checkpoint to checkpoint.

    Args:
        base: folder or Hub id of the base that the adapter was trained on: GPTQ, or one of ours with offsets.
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: the new folder; complete or absent, whatever happens.
        offset_dtype: ``"float16"`` (error 0.03 % of the adapter's own contribution) or ``"float32"``, of offsets and
            changes of scales; default: float16, and float32 where the base has any already.
        copy: copy the base's shards even where they could be hard-linked.

    Raises:
        QALoraError: anything that would make the result wrong; nothing is written then.
    """
    require_offset_dtype(offset_dtype)
    out = require_place(out, base, "the output")
    source, opened = QuantizedCheckpoint.open(base, revision), AdapterFolder.open(adapter)
    files = source.files
    shards = {file: identity(files.folder / file) for file in files.files}
    if reason := unservable(source.specs, dense_modules(files.tensors)):
        logger.warning("%s: %s", base, reason)
    with ThreadPoolExecutor(1) as worker:
        hashing = worker.submit(source.fingerprint)
        source.check_values()
    base_fingerprint = hashing.result()
    recorded = opened.base_fingerprint
    opened.require_base(source.fingerprint(recorded) if is_sampled(recorded) else base_fingerprint, base)
    opened.check_fits(source.specs)

    offset_dtype = offset_dtype or default_offset_dtype(source)
    itemsize = np.dtype(offset_dtype).itemsize
    new_bytes = sum(source.specs[name].groups * source.specs[name].out_features for name in opened.modules) * itemsize
    new_bytes *= 2 if opened.has_scales else 1
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
        added = _write_offsets(writer, source, opened, offset_dtype, progress)
        new_bytes = writer.nbytes
        old = sum(info.end - info.start for name, info in files.tensors.items() if name.endswith(MERGED_PARTS))
        write_index(work, weight_map | added, files.nbytes - old + new_bytes)
        quantization = _quantization_config(source) | {
            "offset_dtype": offset_dtype,
            "base_model": str(base),
            "base_fingerprint": base_fingerprint,
            "adapter": opened.digest(),
        }
        write_config(work, files.config, quantization, any(name.endswith(".scales_delta") for name in added))
        copy_companions(files.folder, opened.folder, work)
        carry_special_tokens(files.folder, work)
        (work / PICTURE_NAME).write_text(picture(strengths(source, opened)), encoding="utf-8")
        card = model_card(out.name, quantization, opened, new_bytes, files.nbytes)
        (work / "README.md").write_text(card, encoding="utf-8")
        _require_unchanged(files, shards)
    logger.info("merged %d linears into %s (%.1f MB new)", len(opened.modules), out, new_bytes / 1e6)
    return MergeResult(out, len(opened.modules), new_bytes, linked)


def default_offset_dtype(base: QuantizedCheckpoint) -> str:
    """float16, or float32 where the base has offsets or changed scales already: rounding those could outweigh what the
    adapter adds."""
    changed = any(spec.offset_dtype or spec.scales_delta_dtype for spec in base.specs.values())
    return "float32" if changed else "float16"


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
        recorded.get("offset_dtype") == (offset_dtype or default_offset_dtype(source))
        and recorded.get("base_fingerprint") == source.fingerprint()
        and Checkpoint.open(folder).method == QALora.method
    )


def _write_offsets(
    writer: ShardWriter, base: QuantizedCheckpoint, adapter: AdapterFolder, dtype: str, progress: bool
) -> dict[str, str]:
    """Write the files of offsets and changes of scales; returns their part of the weight map."""
    wanted, lost, suffering = dict.fromkeys(MERGED_PARTS, 0.0), dict.fromkeys(MERGED_PARTS, 0.0), 0
    count, written = len(adapter.modules) * (2 if adapter.has_scales else 1), set()
    for one in track(_folded(base, adapter, dtype), "merging", count, disable=not progress, transient=True):
        writer.add(one.name, one.stored)
        written.add(one.name)
        part = next(part for part in MERGED_PARTS if one.name.endswith(part))
        wanted[part], lost[part] = wanted[part] + one.wanted, lost[part] + one.lost
        suffering += one.lost > MOST_LOST**2 * one.wanted
    for name, spec in base.specs.items():
        for part, kept in zip(MERGED_PARTS, (spec.offset_dtype, spec.scales_delta_dtype), strict=True):
            if kept and (stored := f"{name}{part}") not in written:
                writer.add(stored, (base.files.tensor if kept == "bfloat16" else base.files.array)(stored))
    if suffering:
        share = max((lost[part] / wanted[part] for part in MERGED_PARTS if wanted[part]), default=float("inf"))
        logger.warning(
            "qalora: %d of %d adapted linears are so small that %s loses more than %.1g of what the adapter adds to "
            "them (%.2g of the whole adapter, in the Euclidean norm). Merge with offset_dtype float32.",
            suffering, count, dtype, MOST_LOST, share**0.5,
        )  # fmt: skip
    return writer.finish()


def _folded(base: QuantizedCheckpoint, adapter: AdapterFolder, dtype: str) -> Iterator[_Folded]:
    """What is stored of every adapted linear, in order, computed ahead of who takes it, by a shard at most."""
    tasks = [(_offsets, name) for name in adapter.modules]
    if adapter.has_scales:
        tasks = [task for name in adapter.modules for task in ((_offsets, name), (_scales_delta, name))]
    begun: deque[Future[_Folded]] = deque()
    size = max(spec.groups * spec.out_features for spec in base.specs.values()) * np.dtype(dtype).itemsize
    ahead = max(2, SHARD_BYTES // size)
    with fold_workers() as workers:
        for task, name in tasks:
            begun.append(workers.submit(task, base, adapter, name, dtype))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _offsets(base: QuantizedCheckpoint, adapter: AdapterFolder, name: str, dtype: str) -> _Folded:
    lora_a, lora_b = adapter.factors(name)
    scaling, before = adapter.scaling(name), base.offsets(name)
    offsets = fold(lora_a, lora_b, scaling, dtype, before)
    if not all_finite(offsets):
        raise QALoraError(f"the offsets of {name} exceed what {dtype} can hold. {_TOO_LARGE[dtype]}.")
    wanted, lost = squared_norm(lora_a, lora_b, scaling), 0.0
    if dtype == "float16" and (before is not None or wanted < _SMALL**2 * offsets.size):
        exact = fold(lora_a, lora_b, scaling, "float32", before)
        lost = float(np.square(exact - offsets, dtype=np.float64).sum())
        if before is None:
            wanted = float(np.square(exact, dtype=np.float64).sum())
    return _Folded(f"{name}.offsets", offsets, wanted, lost)


def _scales_delta(base: QuantizedCheckpoint, adapter: AdapterFolder, name: str, dtype: str) -> _Folded:
    factors = adapter.scale_factors(name)
    assert factors is not None  # only adapters with scales come here
    d, c = factors
    scales, before = base.scales(name)
    delta = fold(d.T, c.T, 1.0, dtype, before, scales)
    if not all_finite(delta):
        raise QALoraError(f"the changed scales of {name} exceed what {dtype} can hold. {_TOO_LARGE[dtype]}.")
    added = fold(d.T, c.T, 1.0, "float32", None, scales)
    exact = added if before is None else fold(d.T, c.T, 1.0, "float32", before, scales)
    lost = np.square(exact - delta, dtype=np.float64).sum() if dtype == "float16" else 0.0
    return _Folded(f"{name}.scales_delta", delta, float(np.square(added, dtype=np.float64).sum()), float(lost))


def _quantization_config(base: QuantizedCheckpoint) -> dict:
    """The base's quantization, as its tensors show it where configs are known to err (``sym``, ``desc_act``)."""
    stated, specs = base.files.quantization, base.specs.values()
    return {
        "bits": Counter(spec.bits for spec in specs).most_common(1)[0][0],  # if the base names none
        "group_size": Counter(spec.group_size for spec in specs).most_common(1)[0][0],
        **{key: stated[key] for key in _KEPT_KEYS if stated.get(key) is not None},
        "desc_act": base.act_order,
        "sym": base.symmetric,
        "checkpoint_format": base.format.reading,
    }
