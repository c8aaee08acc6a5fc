"""A merged checkpoint, or any base → a folder that mlx-lm loads. Codes unchanged; nothing is re-quantized.

A group's scale, zero-point and offset become MLX's ``scale·q + bias``; the bias is rounded once, to float32 unless
asked otherwise. One linear is in memory at a time.
"""

import logging
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_plugin.checkpoint.atomic import new_folder, require_space
from qalora_plugin.checkpoint.companions import copy_companions
from qalora_plugin.checkpoint.json_files import write_json
from qalora_plugin.checkpoint.places import require_place
from qalora_plugin.conversion.model_class import idle_biases
from qalora_plugin.conversion.writer import ShardWriter, write_index
from qalora_plugin.core.errors import os_errors_in_one_line, printable
from qalora_plugin.core.progress import track
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.formats.gptq import is_act_order
from qalora_plugin.formats.mlx import Mlx, affine, as_config, group_size
from qalora_plugin.formats.opened import QuantizedCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass
class MlxExport:
    """What :func:`export_mlx` wrote.

    Attributes:
        folder: the MLX folder. modules: quantized linears. nbytes: of the weights.
        largest_error: of any weight, in units of its group's scale: what rounding scales and biases costs.
    """

    folder: Path
    modules: int
    nbytes: int = 0
    largest_error: float = 0.0

    def summary(self) -> list[str]:
        return [
            f"{self.folder}: {self.modules} linears, {self.nbytes / 1e6:.1f} MB; no weight is off by more than "
            f"{self.largest_error:.1g} of a step",
            f"mlx_lm.generate --model {shlex.quote(printable(self.folder))} --prompt …",
        ]


@os_errors_in_one_line()
def export_mlx(
    merged: str | Path,
    out: str | Path,
    dtype: str = "float32",
    revision: str | None = None,
    progress: bool = True,
) -> MlxExport:
    """Write ``merged`` for MLX.

    Args:
        merged: a merged folder, or a base: whatever is in GPTQ's layout, with or without offsets.
        out: the new folder; complete or absent, whatever happens.
        dtype: of scales and biases: ``"float32"``, or ``"float16"`` or ``"bfloat16"``, smaller and faster, and rounded.

    Raises:
        Unsupported: act-order, groups that MLX has not, experts; nothing is written then.
        QALoraError: it is no such checkpoint, or damaged.
    """
    writer = Mlx(dtype)
    out = require_place(out, merged, "the output")
    source = QuantizedCheckpoint.open(merged, revision)
    files, specs = source.files, source.specs
    for spec in specs.values():
        writer.require(spec, spec.has_g_idx and is_act_order(spec, files.array), source.folder)
    source.require_own_head()
    source.check_values()
    itemsize = 4 if dtype == "float32" else 2
    more = sum(
        2 * itemsize * spec.in_features // group_size(spec.group_size) * spec.out_features for spec in specs.values()
    )
    require_space(out.parent, files.nbytes + more + (16 << 20))

    result = MlxExport(out, len(specs))
    with new_folder(out) as work:
        shards = ShardWriter(work, "model")
        for name, tensor in track(_tensors(source, writer, result), "exporting", _count(source), shown=progress):
            shards.add(name, tensor)
        write_index(work, shards.finish(), shards.nbytes)
        result.nbytes = shards.nbytes
        write_json(work / "config.json", as_config(files.config, specs.values()))
        copy_companions(source.folder, source.folder, work)
        (work / "README.md").write_text(_card(str(merged), dtype, result), encoding="utf-8")
    logger.info("exported %d linears to %s", len(specs), out)
    return result


def _count(source: QuantizedCheckpoint) -> int:
    """Tensors that will be written: three of each linear, and what is dense."""
    owned = sum(len([part for part in source.format.parts(spec) if part != "bias"]) for spec in source.specs.values())
    return len(source.files.tensors) - owned + 3 * len(source.specs)


def _tensors(source: QuantizedCheckpoint, writer: Mlx, result: MlxExport) -> "Iterator[tuple[str, Tensor]]":
    """All tensors, in the checkpoint's order; ``result`` learns of the rounding."""
    idle = idle_biases(source)
    parts = {name: set(source.format.parts(spec)) - {"bias"} for name, spec in source.specs.items()}
    for tensor in source.files.tensors:
        name, _, part = tensor.rpartition(".")
        if tensor in idle:
            continue
        if part not in parts.get(name, ()):
            yield tensor, source.files.tensor(tensor)
        elif part == "qweight":
            weight = source.weight(name)
            written = writer.write(name, weight)
            result.largest_error = max(result.largest_error, _error(name, weight, written))
            yield from written.items()


def _error(name: str, weight: GroupwiseWeight, written: "dict[str, Tensor]") -> float:
    """The largest error that a weight can have, over its group's scale."""
    scales, biases = affine(weight)
    repeats = weight.group_size // group_size(weight.group_size)
    stored_scales, stored_biases = (written[f"{name}.{part}"].double().t()[::repeats] for part in ("scales", "biases"))
    top = (1 << weight.bits) - 1
    error = (stored_biases - biases).abs() + top * (stored_scales - scales).abs()
    return (error / scales.abs().clamp(min=1e-30)).max().item()


def _card(merged: str, dtype: str, result: MlxExport) -> str:
    return f"""---
library_name: mlx
tags: [qalora, mlx]
---

# {printable(result.folder.name)}

`{printable(merged)}` for MLX: the same codes, scales and offsets, nothing re-quantized. {result.modules} linears;
scales and biases in {dtype}, rounded once: no weight is off by more than {result.largest_error:.1g} of a step.

    mlx_lm.generate --model {shlex.quote(printable(result.folder.name))} --prompt "…"
"""
