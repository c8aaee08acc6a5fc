"""Adapter + GPTQ base → merged INT4 checkpoint. One addition, nothing re-quantised, the model is never loaded.

The base's shards are linked (or copied) unchanged; the adapter becomes ``<module>.offsets`` [G, N] in files of its own:
``w' = scales·(q − zeros) + offsets``. At any model size it takes the memory of two shards of offsets: one is computed
while the other is written.
"""

import logging
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track
from safetensors.numpy import save_file

from .adapter_folder import AdapterFolder
from .atomic import link_or_copy, new_folder, require_space, same_disk
from .card import model_card
from .companions import carry_special_tokens, copy_companions
from .errors import QALoraError, os_errors_in_one_line
from .folding import fold, fold_workers, squared_norm
from .places import require_place
from .quant.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_json, write_json
from .quant.fingerprint import Identity, fingerprint, identity, is_sampled, keep_remembering
from .quant.fusion import dense_modules, unservable
from .quant.modules import (
    FORMAT_VERSION,
    MERGED_METHOD,
    NEEDS_QALORA,
    WEIGHTS_KEY,
    QuantizedModule,
    all_finite,
    check_values,
    checkpoint_format,
    is_act_order,
    is_symmetric,
    require_base,
)

logger = logging.getLogger(__name__)

OFFSET_DTYPES = ("float16", "float32")
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
    """One linear's ``offsets`` [G, N] as stored, the squared norm of what they should be, and of what rounding lost."""

    name: str
    offsets: np.ndarray
    wanted: float
    lost: float


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote: the folder, how many linears got offsets, bytes that are new, whether shards were linked."""

    folder: Path
    modules: int
    new_bytes: int
    linked: bool


@os_errors_in_one_line()
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
    out = require_place(out, base, "the output")
    checkpoint, opened = Checkpoint.open(base, revision), AdapterFolder.open(adapter)
    shards = {file: identity(checkpoint.folder / file) for file in checkpoint.files}
    modules = require_base(checkpoint)
    if reason := unservable(modules, dense_modules(checkpoint.tensors)):
        logger.warning("%s: %s", base, reason)
    with ThreadPoolExecutor(1) as worker:
        hashing = worker.submit(fingerprint, checkpoint)
        check_values(checkpoint, modules)
    base_fingerprint = hashing.result()
    recorded = opened.base_fingerprint
    opened.require_base(fingerprint(checkpoint, recorded) if is_sampled(recorded) else base_fingerprint, base)
    opened.check_fits(modules)

    itemsize = np.dtype(offset_dtype).itemsize
    sizes = {name: modules[name].groups * modules[name].out_features * itemsize for name in opened.modules}
    new_bytes = sum(sizes.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    linked = not copy and same_disk(checkpoint.folder / checkpoint.files[0], out.parent)
    require_space(out.parent, new_bytes + (0 if linked else checkpoint.nbytes) + (16 << 20))

    names = {file: "model-00001-of-00001.safetensors" if file == SINGLE_NAME else file for file in checkpoint.files}
    plan = _plan_shards(sizes, taken=set(names.values()))
    with new_folder(out, flush=linked) as work:  # to wait for copies would take twice their time
        for file, name in names.items():
            linked = link_or_copy(checkpoint.folder / file, work / name, copy) and linked
        weight_map = {tensor: names[info.file] for tensor, info in checkpoint.tensors.items()}
        weight_map |= _write_offsets(work, opened, plan, offset_dtype, progress)
        write_json(
            work / INDEX_NAME, {"metadata": {"total_size": checkpoint.nbytes + new_bytes}, "weight_map": weight_map}
        )
        quantization = _quantization_config(checkpoint, modules) | {
            "offset_dtype": offset_dtype,
            "base_model": str(base),
            "base_fingerprint": base_fingerprint,
            "adapter": opened.digest(),
            "format_version": FORMAT_VERSION,
        }
        write_json(
            work / "config.json",
            checkpoint.config | {"quantization_config": quantization, WEIGHTS_KEY: NEEDS_QALORA},
        )
        copy_companions(checkpoint.folder, opened.folder, work)
        carry_special_tokens(checkpoint.folder, work)
        card = model_card(out.name, quantization, opened, new_bytes, checkpoint.nbytes)
        (work / "README.md").write_text(card, encoding="utf-8")
        _require_unchanged(checkpoint, shards)
    logger.info("merged %d linears into %s (%.1f MB new)", len(opened.modules), out, new_bytes / 1e6)
    return MergeResult(out, len(opened.modules), new_bytes, linked)


def _require_unchanged(checkpoint: Checkpoint, shards: dict[str, Identity]) -> None:
    """Refuse to finish if a shard was written to, or exchanged, since it was opened (links to it are no change)."""
    for file, before in shards.items():
        path = checkpoint.folder / file
        if identity(path)[:4] != before[:4]:
            raise QALoraError(
                f"{path} was changed while it was being merged. Wait until it is complete, and try again."
            )
        keep_remembering(path, before)


def require_offset_dtype(name: str) -> None:
    """Refuse what :func:`merge` cannot store offsets as."""
    if name not in OFFSET_DTYPES:
        raise QALoraError(f"offset_dtype is {name!r}, expected one of {', '.join(OFFSET_DTYPES)}.")


@os_errors_in_one_line()
def is_merge_of(
    folder: str | Path, base: str | Path, adapter: str | Path, offset_dtype: str, revision: str | None = None
) -> bool:
    """True if ``folder`` is already the merge of exactly this adapter into exactly this base, with such offsets.

    Raises:
        QALoraError: it is, but damaged (a power failure soon after merging can cut copied shards short).
    """
    config = Path(folder) / "config.json"
    if not config.is_file():
        return False
    recorded = read_json(config).get("quantization_config")
    return (
        isinstance(recorded, dict)
        and recorded.get("offset_dtype") == offset_dtype
        and recorded.get("adapter") == AdapterFolder.open(adapter).digest()
        and recorded.get("base_fingerprint") == fingerprint(Checkpoint.open(base, revision))
        and Checkpoint.open(folder).method == MERGED_METHOD
    )


def _plan_shards(sizes: dict[str, int], taken: set[str]) -> dict[str, list[str]]:
    """Name of an offset file → modules in it, each file at most ``SHARD_BYTES`` (or one module), none already taken."""
    parts, used = [[]], 0
    for name, size in sizes.items():
        if used and used + size > SHARD_BYTES:
            parts, used = [*parts, []], 0
        parts[-1].append(name)
        used += size
    stem = "offsets"
    while True:
        files = [f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
        if len(parts) == 1:
            files = [f"{stem}.safetensors"]
        if taken.isdisjoint(files):
            return dict(zip(files, parts, strict=True))
        stem += "-merged"


def _write_offsets(
    work: Path, adapter: AdapterFolder, shards: dict[str, list[str]], dtype: str, progress: bool
) -> dict[str, str]:
    """Write the offset files; returns their part of the weight map."""
    wanted, lost, suffering = 0.0, 0.0, 0
    with fold_workers() as workers:

        def begin(names: list[str]) -> list[Future]:
            return [workers.submit(_offsets, adapter, name, dtype) for name in names]

        files = list(shards)
        begun = begin(shards[files[0]])
        for i, file in enumerate(track(files, "merging", disable=not progress, transient=True), 1):
            folded = [future.result() for future in begun]
            begun = begin(shards[files[i]]) if i < len(files) else []
            tensors = {f"{linear.name}.offsets": linear.offsets for linear in folded}
            save_file(tensors, work / file, metadata={"format": "pt"})
            wanted, lost = wanted + sum(one.wanted for one in folded), lost + sum(one.lost for one in folded)
            suffering += sum(one.lost > MOST_LOST**2 * one.wanted for one in folded)
    if suffering:
        logger.warning(
            "qalora: %d of %d adapted linears are so small that %s loses more than %.1g of what the adapter adds to "
            "them (%.2g of the whole adapter, in the Euclidean norm). Merge with offset_dtype float32.",
            suffering, len(adapter.modules), dtype, MOST_LOST, (lost / wanted) ** 0.5,
        )  # fmt: skip
    return {f"{name}.offsets": file for file, names in shards.items() for name in names}


def _offsets(adapter: AdapterFolder, name: str, dtype: str) -> _Folded:
    lora_a, lora_b = adapter.factors(name)
    scaling = adapter.scaling(name)
    offsets = fold(lora_a, lora_b, scaling, dtype)
    if not all_finite(offsets):
        raise QALoraError(f"the offsets of {name} exceed what {dtype} can hold. {_TOO_LARGE[dtype]}.")
    wanted, lost = squared_norm(lora_a, lora_b, scaling), 0.0
    if dtype == "float16" and wanted < _SMALL**2 * offsets.size:
        exact = fold(lora_a, lora_b, scaling, "float32")
        lost = float(np.square(exact - offsets, dtype=np.float64).sum())
        wanted = float(np.square(exact, dtype=np.float64).sum())
    return _Folded(name, offsets, wanted, lost)


def _quantization_config(checkpoint: Checkpoint, modules: dict[str, QuantizedModule]) -> dict:
    """The base's quantisation, as its tensors show it where configs are known to err (``sym``, ``desc_act``)."""
    base = checkpoint.quantization
    return {
        "quant_method": MERGED_METHOD,
        "bits": Counter(module.bits for module in modules.values()).most_common(1)[0][0],  # if the base names none
        "group_size": Counter(module.group_size for module in modules.values()).most_common(1)[0][0],
        **{key: base[key] for key in _KEPT_KEYS if base.get(key) is not None},
        "desc_act": any(is_act_order(checkpoint, module) for module in modules.values()),
        "sym": all(is_symmetric(checkpoint, module) for module in modules.values()),
        "checkpoint_format": checkpoint_format(base),
    }
