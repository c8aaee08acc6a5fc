"""AWQ and compressed-tensors → a GPTQ v2 folder that an adapter can go onto. No code, scale or zero-point changes.

Words are transposed or put into another order, zero-points unpacked and packed; everything dense is copied. One linear
is in memory at a time.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_plugin.checkpoint.atomic import new_folder, require_space
from qalora_plugin.checkpoint.companions import copy_companions
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.checkpoint.places import require_place
from qalora_plugin.conversion.gptq_config import gptq_config
from qalora_plugin.conversion.writer import write_model
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.progress import track
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.formats.awq import Awq
from qalora_plugin.formats.base import CheckpointFormat, Unsupported
from qalora_plugin.formats.compressed_tensors import CompressedTensors
from qalora_plugin.formats.fusion import dense_modules, unservable
from qalora_plugin.formats.gptq import Gptq
from qalora_plugin.formats.gptq_zeros import V2

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMATS: tuple[type[Awq] | type[CompressedTensors], ...] = (Awq, CompressedTensors)


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote: the folder, how many linears, whether every zero-point is symmetric, act-order."""

    folder: Path
    modules: int
    symmetric: bool
    act_order: bool

    def summary(self) -> list[str]:
        kind = "symmetric" if self.symmetric else "asymmetric"
        order = ", in act-order" if self.act_order else ""
        return [
            f"{self.folder}: {self.modules} linears, {kind}{order}; not one code was changed. Train on it as a base"
        ]


@os_errors_in_one_line()
def import_packed(src: str | Path, out: str | Path, revision: str | None = None, progress: bool = True) -> ImportResult:
    """Write ``src``, an AWQ (gemm) or compressed-tensors (pack-quantized) checkpoint, as a GPTQ v2 folder.

    Args:
        src: folder or Hub id. out: the new folder; complete or absent, whatever happens.

    Raises:
        Unsupported: it holds what GPTQ cannot; nothing is written then.
        QALoraError: it is of another kind, or damaged.
    """
    out = require_place(out, src, "the output")
    files = Checkpoint.open(src, revision)
    found = _detect(files)
    specs = found.specs(files.tensors, files.folder)
    owned = _owned(files, found, specs)
    for spec in specs.values():
        _require_whole_words(spec, files.folder)
        found.check_values(spec, files.array, files.folder)
    if reason := unservable(specs, dense_modules(files.tensors), files.config):
        logger.warning("%s: %s", src, reason)
    symmetric = all(found.is_symmetric(spec, files.array) for spec in specs.values())
    act_order = isinstance(found, CompressedTensors) and any(
        found.is_act_order(spec, files.array) for spec in specs.values()
    )
    stored_g_idx = 4 * sum(spec.in_features for spec in specs.values())
    require_space(out.parent, files.nbytes + files.nbytes // 100 + stored_g_idx + (16 << 20))
    quantization = gptq_config(files, specs, V2, symmetric, act_order)
    with new_folder(out) as work:
        write_model(work, files.config, quantization, _tensors(files, found, specs, owned, progress))
        copy_companions(files.folder, files.folder, work)
    logger.info("imported %d linears into %s", len(specs), out)
    return ImportResult(out, len(specs), symmetric, act_order)


def _detect(files: Checkpoint) -> CheckpointFormat:
    for kind in FORMATS:
        if kind.detect(files.quantization):
            return kind(files.quantization, files.folder)
    raise QALoraError(
        f"{files.folder} has quant_method {short(files.method)}, expected one of "
        f"{', '.join(kind.method for kind in FORMATS)}. Import what is of these; a GPTQ folder is a base as it is."
    )


def _owned(files: Checkpoint, found: CheckpointFormat, specs: dict[str, GroupwiseSpec]) -> dict[str, str]:
    """Tensors that are words, scales or zero-points → the linear they belong to; biases are not of them."""
    owned = {f"{name}.{part}": name for name, spec in specs.items() for part in found.parts(spec) if part != "bias"}
    for tensor in files.tensors:
        name, _, part = tensor.rpartition(".")
        if name in specs and tensor not in owned and part != "bias":
            raise Unsupported(
                f"{files.folder}: {tensor} is no part of {found.reading} that an import knows.",
                "Update qalora, or make a GPTQ checkpoint of the original 16-bit model: qalora quantize MODEL OUT.",
            )
    return owned


def _require_whole_words(spec: GroupwiseSpec, where: object) -> None:
    """GPTQ's words run along K in ``qweight`` and along N in ``qzeros``, and are not padded."""
    period = codes_per_period(spec.bits)
    for letter, size in (("in_features", spec.in_features), ("out_features", spec.out_features)):
        if size % period:
            raise Unsupported(
                f"{where}: {spec.name} has {letter} {size}, which is no multiple of {period}: GPTQ's {spec.bits}-bit "
                "words would need padding.",
                "Leave this linear dense when quantizing, or use other bits.",
            )


def _tensors(
    files: Checkpoint,
    found: CheckpointFormat,
    specs: dict[str, GroupwiseSpec],
    owned: dict[str, str],
    progress: bool,
) -> "Iterator[tuple[str, Tensor]]":
    """All tensors of the new folder, in the order of the old one."""
    target, written = Gptq({"checkpoint_format": V2}), set()
    for tensor in track(files.tensors, "importing", shown=progress):
        name = owned.get(tensor)
        if name is None:
            yield tensor, files.tensor(tensor)
        elif name not in written:
            written.add(name)
            yield from target.write(name, found.read(specs[name], files.tensor)).items()
