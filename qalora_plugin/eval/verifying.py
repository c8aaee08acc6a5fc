"""The proof: a merged checkpoint equals base + adapter. Everything is read back from disk, nothing taken on trust.

Storing the offsets rounds them, and that is all that a right merge changes. So what is judged is what rounding cannot
do:

1. a base tensor that is not the base's, bit for bit, a tensor that neither has, or another value in config.json (which
   the few tokens below need not show: a limit of positions);
2. an offset, or a change of a scale, that is not its definition, rounded once: off by more than half a unit in the last
   place of what it is stored in. (Each by itself: a wrong factor, a swapped linear, one wrong number cannot hide behind
   a large adapter. The sum of scale and change is taken in float64: that it is float32 later, as s·(1 + D·C) was in
   training, is the base's own rounding. An offset that is stored as factors is their product, in float64 too, and may
   be off by what half a unit in the last place of each of them makes of it);
3. an adapter so small that the rounding eats it;
4. logits in float32 that differ where nothing was rounded: base + adapter, as it was trained, against the merged
   checkpoint, as transformers loads it, with its offsets and changes of scales put to their exact values.

What the rounding does to the logits is reported, not judged: a large adapter, or a model that amplifies every error,
moves them further, and near ties then turn over. (A top-1 token can change only where its margin is below twice the
difference, so its agreement says nothing that the difference does not.)
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.progress import track
from qalora_plugin.core.reference import (
    adapter_offsets,
    adapter_scales,
    column_groups,
    dequantize,
    factored_offsets,
    unit_steps,
)
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.eval.limits import fitting_length, model_config, positions, vocabulary
from qalora_plugin.eval.logits import compare_logits
from qalora_plugin.eval.report import WEIGHT_BARS, VerifyReport
from qalora_plugin.eval.tokens import SEQUENCE_LENGTH, default_texts, load_tokenizer, require_ids, tokenize
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.qalora import FACTORS, MERGED_PARTS, OFFSETS, SCALES, WEIGHTS_KEY, QALora

logger = logging.getLogger(__name__)

_NOISE = 2.0**-48  # of float64 sums, relative
_SAVED_ANEW = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", WEIGHTS_KEY,
    "quantization_config",
)  # fmt: skip
_COLUMNS = 512  # output columns of a weight that are compared at a time


@os_errors_in_one_line()
def verify(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    sequences: list[list[int]] | None = None,
    texts: list[str] | None = None,
    max_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> VerifyReport:
    """Compare a merged checkpoint with base + adapter: tensors, weights, logits.

    Args:
        sequences: token ids to compare logits on; else ``texts`` (else the standard library's documentation) is
            tokenised, up to ``max_tokens``. None is longer than what the model takes.
        dtype: compute dtype of the logits; the bars are for float32.
        device: default CUDA if there is one.

    Raises:
        QALoraError: one of the three cannot be read, or they do not belong together.
    """
    files, opened, source = (
        Checkpoint.open(merged),
        AdapterFolder.open(adapter),
        QuantizedCheckpoint.open(base, revision),
    )
    if files.method != QALora.method:
        raise QALoraError(f"{merged} has quant_method {files.method!r}: it is no merged QA-LoRA checkpoint.")
    result = QuantizedCheckpoint.of(files)
    opened.check_fits(source.specs)
    # What the adapter changes is no longer the base's: offsets, and changes of scales, that a base of ours has already.
    parts = (*OFFSETS, SCALES[1]) if opened.has_scales else OFFSETS
    changed = {f"{module}.{part}" for module in opened.modules for part in parts}
    kept = [name for name in sorted(source.files.tensors) if name not in changed]
    known = {*source.files.tensors, *(name for name in files.tensors if name.endswith(MERGED_PARTS))}
    if stray := sorted(files.tensors.keys() - known):
        raise QALoraError(f"{files.folder} holds {stray[0]}, which the base does not, and no merge adds. Merge again.")
    config = model_config(source.folder)
    if not sequences:
        length = fitting_length(config, SEQUENCE_LENGTH)
        sequences = tokenize(load_tokenizer(result.folder), texts or default_texts(), max_tokens, length)
    sequences = [ids[: positions(config)] for ids in sequences]
    require_ids(sequences, vocabulary(config), str(base))
    identical, sha256 = _compare_tensors(source.files, files, kept, progress)
    weights = _compare_weights(source, result, opened, progress)
    offset_dtype = str(result.specs[opened.modules[0]].offset_dtype)  # others keep what the base has them in
    if offset_dtype not in WEIGHT_BARS:
        raise QALoraError(
            f"{merged} holds the offsets of {opened.modules[0]} in {offset_dtype}, and a merge writes "
            f"{' or '.join(WEIGHT_BARS)}. Merge again."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    logits = compare_logits(source.folder, opened, result.folder, sequences, dtype, device)
    offsets = [info.end - info.start for name, info in files.tensors.items() if name.endswith(MERGED_PARTS)]
    return VerifyReport(
        base=str(base),
        adapter=str(adapter),
        merged=str(merged),
        tensors=len(kept),
        tensors_identical=identical,
        base_sha256=sha256,
        modules=len(opened.modules),
        dtype=str(dtype).removeprefix("torch."),
        offset_dtype=offset_dtype,
        base_bytes=source.files.nbytes,
        merged_new_bytes=sum(offsets),
        config_differences=_config_differences(source.files, files),
        **weights,
        **logits,
    )


def _config_differences(source: Checkpoint, result: Checkpoint) -> tuple[str, ...]:
    """Values of config.json that differ, as transformers reads them: a model that it saved has them filled in. Where it
    cannot read them, those that both have. (Special tokens are the training run's.)"""
    base, merged = _values(source.config), _values(result.config)
    if base != merged:
        try:
            read = [AutoConfig.from_pretrained(one.folder, trust_remote_code=False) for one in (source, result)]
        except Exception as error:  # a class of the checkpoint's own: compared as they are written
            logger.debug("config.json of %s: %s", result.folder, error)
            base = {key: value for key, value in base.items() if key in merged}
        else:
            base, merged = (_values(config.to_dict()) for config in read)
    return tuple(
        f"{key}: {short(merged.get(key))}, the base's {short(value)}"
        for key, value in base.items()
        if merged.get(key) != value
    )


def _values(config: dict[str, Any], inside: str = "") -> dict[str, Any]:
    """Plain values of a config that a save does not write anew, those of its parts as ``part.key``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in _SAVED_ANEW or str(key).endswith("_token_id"):
            continue
        found |= _values(value, f"{inside}{key}.") if isinstance(value, dict) else {f"{inside}{key}": value}
    return found


def _compare_tensors(source: Checkpoint, result: Checkpoint, names: list[str], progress: bool) -> tuple[int, str]:
    """How many of these tensors are in the merged checkpoint bit for bit, and a hash over all of them."""
    digest, identical = hashlib.sha256(), 0
    for name in track(names, "tensors", shown=progress):
        info, other = source.tensors[name], result.tensors.get(name)
        data = _bytes_of(source.tensor(name))
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        digest.update(data.numpy().data)
        if other is not None and (other.dtype, other.shape) == (info.dtype, info.shape):
            identical += torch.equal(data, _bytes_of(result.tensor(name)))
    return identical, digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _compare_weights(
    source: QuantizedCheckpoint, result: QuantizedCheckpoint, adapter: AdapterFolder, progress: bool
) -> dict[str, Any]:
    """Errors of the merged weights against ``w + s·D·C·(q − z) + α/R·(B·A)ᵀ`` per group, in float64; where scales were
    trained, ``(B·A)ᵀ`` in units of them."""
    for what, part, adapted in (
        ("offsets", "offset_dtype", adapter.modules),
        ("changed scales", "scales_delta_dtype", adapter.modules if adapter.has_scales else []),
    ):
        changed, had = (
            {name for name, spec in one.specs.items() if getattr(spec, part)} for one in (result, source)
        )  # fmt: skip
        if stray := sorted(changed.difference(adapted, had)):
            raise QALoraError(
                f"{result.folder}: {stray[0]} has {what}, but the adapter does not change it. Merge again."
            )
        if lacking := sorted(had.union(adapted) - changed):
            raise QALoraError(f"{result.folder}: {lacking[0]} has no {what}, but it should. Merge again.")
    largest, in_roundings, error, contribution = 0.0, 0.0, 0.0, 0.0
    for name in track(adapter.modules, "weights", shown=progress):
        scales_dtype = result.specs[name].scales_delta_dtype
        before, after = _unrounded(source, name), _unrounded(result, name)
        group = column_groups(before)
        lora_a, lora_b = map(torch.from_numpy, adapter.factors(name))
        trained_on, earlier = (
            None if tensor is None else torch.from_numpy(tensor)
            for tensor in (source.scales(name) if adapter.has_scales else (None, None))
        )
        delta = adapter_offsets(lora_a, lora_b, adapter.scaling(name), trained_on)
        stored = delta if before.offsets is None else delta + before.offsets.double()
        rounding = _offset_rounding(result, name, stored) + _NOISE * stored.abs().max()
        change, scales_rounding = torch.zeros_like(delta), torch.zeros_like(delta)
        factors = adapter.scale_factors(name)
        if factors and trained_on is not None:
            d, c = map(torch.from_numpy, factors)
            change = adapter_scales(trained_on, d, c)
            in_all = change if earlier is None else change + earlier.double()
            scales_rounding = half_ulp(in_all, str(scales_dtype)) + _NOISE * after.scales.abs()
        for start in range(0, before.out_features, _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            one = before.narrow(n=columns)
            steps = unit_steps(one)
            weight, added = dequantize(one), delta[group, columns] + change[group, columns] * steps
            difference = (dequantize(after.narrow(n=columns)) - (weight + added)).abs_()
            largest = _larger(largest, difference)
            error += difference.square().sum().item()
            contribution += added.square().sum().item()
            allowed = rounding[group, columns] + scales_rounding[group, columns] * steps.abs_()
            allowed += _NOISE * (weight.abs() + added.abs())
            in_roundings = _larger(in_roundings, difference / allowed)
    return {
        "weight_error_max": largest,
        "weight_error_relative": (error / contribution) ** 0.5 if contribution else 0.0,
        "offset_error": in_roundings,
    }


def _unrounded(source: QuantizedCheckpoint, name: str) -> GroupwiseWeight:
    """One linear, its scales the sum of what is stored in float64, its offsets the product."""
    weight = source.weight(name)
    if source.specs[name].offset_rank:
        weight = weight._replace(offsets=factored_offsets(*_factors(source, name)))
    if source.specs[name].scales_delta_dtype is None:
        return weight
    scales, change = (source.files.tensor(f"{name}.{part}").double() for part in SCALES)
    return weight._replace(scales=scales + change)


def _offset_rounding(result: QuantizedCheckpoint, name: str, exact: Tensor) -> Tensor:
    """The most by which storing it moves each offset ``[G, N]``."""
    spec = result.specs[name]
    if not spec.offset_rank:
        return half_ulp(exact, str(spec.offset_dtype))
    a, b = (factor.double() for factor in _factors(result, name))
    return a.abs() @ half_ulp(b, str(spec.offset_dtype)) + half_ulp(a, "float32") @ b.abs()


def _factors(source: QuantizedCheckpoint, name: str) -> tuple[Tensor, Tensor]:
    a, b = (source.files.tensor(f"{name}.{part}") for part in FACTORS)
    return a, b


def _larger(value: float, tensor: Tensor) -> float:
    """The larger of ``value`` and all of ``tensor``; NaN if anything is."""
    return torch.maximum(tensor.new_tensor(value), tensor.max()).item()


def half_ulp(values: Tensor, dtype: str) -> Tensor:
    """The most by which rounding to ``"float16"`` or ``"float32"`` moves float64 ``values``: half a unit in the last
    place of each."""
    info = torch.finfo(getattr(torch, dtype))
    _, exponent = torch.frexp(values)  # values = m·2^exponent, m in [½, 1)
    normal = torch.ldexp(torch.full_like(values, info.eps / 4), exponent)
    return normal.clamp(min=info.smallest_normal * info.eps / 2)
