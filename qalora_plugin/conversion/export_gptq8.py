"""A merged checkpoint → symmetric 8-bit GPTQ, for tools that know no offsets: stock vLLM, transformers with GPTQModel.

The one export that re-quantizes, to nearest, and so loses something: its result says how much. It takes twice the bytes
of 4 bits. Groups are of consecutive columns, also where the base's are in act-order. One linear is in memory at a time.
vLLM has kernels for it on GPUs only (0.32: on a CPU its GPTQ is of 4 bits).
"""

import logging
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_plugin.checkpoint.atomic import new_folder, require_space
from qalora_plugin.checkpoint.companions import copy_companions
from qalora_plugin.checkpoint.places import require_place
from qalora_plugin.conversion.card import auto_class_name
from qalora_plugin.conversion.gptq_config import gptq_config
from qalora_plugin.conversion.writer import write_model
from qalora_plugin.core.errors import os_errors_in_one_line, printable
from qalora_plugin.core.progress import track
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gptq import Gptq
from qalora_plugin.formats.gptq_zeros import V1
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.qalora import WEIGHTS_KEY

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

BITS, ZERO = 8, 128
GROUP_SIZES = (128, 64, 32)  # that stock kernels take
MOST_LOST = 0.5  # of what the offsets add, beyond which a warning says so
_BLOCK = 1 << 22  # weights that are in float64 at a time
_SMALLEST = 2.0**-24  # float16
_LOGITS = "| logits | "
_UNMEASURED = f"{_LOGITS}not measured |"


@dataclass
class Gptq8Export:
    """What :func:`export_gptq8` wrote, and lost; norms are Frobenius norms over all linears.

    Attributes:
        folder: the GPTQ folder. modules: quantized linears. group_size: theirs.
        error: ‖w8 − w'‖². weights: ‖w'‖². offsets: ‖w' without offsets − w'‖²; 0 where there are none.
    """

    folder: Path
    modules: int
    group_size: int
    error: float = 0.0
    weights: float = 0.0
    offsets: float = 0.0

    @property
    def lost_of_weights(self) -> float:
        """‖w8 − w'‖ / ‖w'‖."""
        return (self.error / self.weights) ** 0.5 if self.weights else 0.0

    @property
    def lost_of_offsets(self) -> float | None:
        """‖w8 − w'‖ / ‖offsets‖, the share of the adapter's effect on the weights; None without offsets."""
        return (self.error / self.offsets) ** 0.5 if self.offsets else None

    def summary(self) -> list[str]:
        return [f"{self.folder}: {self.modules} linears, 8 bit, group size {self.group_size}", str(self)]

    def __str__(self) -> str:
        share = "" if self.lost_of_offsets is None else f", {self.lost_of_offsets:.2%} of what the offsets add"
        return f"rounding to 8 bits loses {self.lost_of_weights:.2%} of the weights{share}"


@os_errors_in_one_line()
def export_gptq8(
    merged: str | Path,
    out: str | Path,
    group_size: int | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Gptq8Export:
    """Write ``merged`` as a symmetric 8-bit GPTQ folder.

    Args:
        merged: a merged folder, or a base: whatever is in GPTQ's layout, with or without offsets.
        out: the new folder; complete or absent, whatever happens.
        group_size: 128, 64 or 32; default: the source's if it is one of these, else the largest that divides all.

    Raises:
        Unsupported: no such group size divides every linear; nothing is written then.
        QALoraError: it is no such checkpoint, or damaged.
    """
    out = require_place(out, merged, "the output")
    source = QuantizedCheckpoint.open(merged, revision)
    source.require_own_head()
    size = _group_size(source, group_size)
    source.check_values()
    specs = {
        name: replace(
            spec, bits=BITS, group_size=size, scale_dtype="float16", offset_dtype=None, offset_rank=0, has_g_idx=True
        )
        for name, spec in source.specs.items()
    }
    bytes_made = sum(spec.out_features * (spec.in_features + 3 * spec.groups) for spec in specs.values())
    require_space(out.parent, bytes_made + source.files.nbytes + (16 << 20))

    result = Gptq8Export(out, len(specs), size)
    config = {key: value for key, value in source.files.config.items() if key != WEIGHTS_KEY}
    quantization = gptq_config(source.files, specs, V1, symmetric=True)
    with new_folder(out) as work:
        write_model(work, config, quantization, _tensors(source, size, result, progress))
        copy_companions(source.folder, source.folder, work)
        (work / "README.md").write_text(_card(str(merged), config, result), encoding="utf-8")
    if (result.lost_of_offsets or 0) > MOST_LOST:
        logger.warning(
            "%s: %s. Smaller groups lose less, and serving the merged checkpoint itself loses nothing.", out, result
        )
    return result


def _group_size(source: QuantizedCheckpoint, wanted: int | None) -> int:
    specs = source.specs.values()
    candidates: tuple[int, ...]
    if wanted is None:
        (common, _), *_ = Counter(spec.group_size for spec in specs).most_common(1)
        candidates = (common, *GROUP_SIZES) if common in GROUP_SIZES else GROUP_SIZES
    else:
        candidates = (wanted,)
    for size in candidates:
        if size in GROUP_SIZES and not any(spec.in_features % size for spec in specs):
            return size
    if wanted is not None and wanted not in GROUP_SIZES:
        raise Unsupported(f"group_size is {wanted}; stock kernels take 32, 64 and 128.", "Choose one of these.")
    odd = next(spec for spec in specs if spec.in_features % candidates[-1])
    raise Unsupported(
        f"{source.folder}: {odd.name} has in_features {odd.in_features}, which a group size of {candidates[-1]} does "
        "not divide.",
        "Choose a smaller group_size of 32, 64 and 128." if wanted else "Export gguf or mlx.",
    )


def _tensors(
    source: QuantizedCheckpoint, size: int, result: Gptq8Export, progress: bool
) -> "Iterator[tuple[str, Tensor]]":
    """All tensors, in the checkpoint's order; ``result`` learns of what is lost."""
    target = Gptq({"checkpoint_format": V1})
    parts = {name: set(source.format.parts(spec)) - {"bias"} for name, spec in source.specs.items()}
    for tensor in track(source.files.tensors, "re-quantizing", shown=progress):
        name, _, part = tensor.rpartition(".")
        if part not in parts.get(name, ()):
            yield tensor, source.files.tensor(tensor)
        elif part == "qweight":
            yield from target.write(name, _requantized(source.weight(name), size, result)).items()


def _requantized(weight: GroupwiseWeight, size: int, result: Gptq8Export) -> GroupwiseWeight:
    """Rounded to nearest: ``s8·(q8 − 128)``, s8 = max|w'| / 127 in float16."""
    import torch

    from qalora_plugin.core.packing import pack_rows
    from qalora_plugin.core.reference import dequantize

    columns, groups = weight.out_features, weight.in_features // size
    words = torch.empty(weight.in_features * BITS // 32, columns, dtype=torch.int32)
    scales = torch.empty(groups, columns, dtype=torch.float16)
    width = max(1, _BLOCK // weight.in_features)
    for start in range(0, columns, width):
        block = slice(start, start + width)
        dense = dequantize(weight.narrow(n=block)).view(groups, size, -1)
        step = (dense.abs().amax(1) / 127).clamp(min=_SMALLEST).half()
        codes = (dense / step.double()[:, None]).round_().clamp_(-ZERO, ZERO - 1)
        words[:, block] = pack_rows((codes + ZERO).view(weight.in_features, -1), BITS)
        scales[:, block] = step
        result.error += (codes * step.double()[:, None] - dense).square().sum().item()
        result.weights += dense.square().sum().item()
    if weight.offsets is not None:
        result.offsets += weight.group_size * weight.offsets.double().square().sum().item()
    zeros = torch.full((groups, columns), ZERO, dtype=torch.uint8)
    return GroupwiseWeight(words, zeros, scales, None, None, None, BITS, size)


def add_logit_change(folder: Path, figures: str) -> None:
    """Put what the rounding does to the logits into the card of an export."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(text.replace(_UNMEASURED, f"{_LOGITS}{figures} |"), encoding="utf-8")


def _card(merged: str, config: dict[str, Any], result: Gptq8Export) -> str:
    share, cls = result.lost_of_offsets, auto_class_name(config)
    offsets = "there are none" if share is None else f"{share:.2%}: ‖w8 − w'‖ / ‖offsets‖"
    return f"""---
library_name: transformers
tags: [gptq, 8-bit]
---

# {printable(result.folder.name)}

`{printable(merged)}` as symmetric 8-bit GPTQ, for tools that know no offsets. **Re-quantized, to nearest: not exact.**

| | |
|---|---|
| linears | {result.modules}, 8 bit, group size {result.group_size} |
| lost of the weights | {result.lost_of_weights:.2%}: ‖w8 − w'‖ / ‖w'‖ |
| lost of what the offsets add | {offsets} |
{_UNMEASURED}

## Use

    vllm serve {shlex.quote(printable(result.folder.name))}

    model = {cls}.from_pretrained("{printable(result.folder.name)}")     # transformers with GPTQModel
"""
