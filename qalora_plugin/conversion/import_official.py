"""What the official QA-LoRA repository makes → ours: adapters as adapters, merged checkpoints as such with offsets.

Of a merged checkpoint every code and scale stays, bit for bit; its float zero-points become the nearest integers (the
base's own, where it is given) and float32 offsets. One linear is in memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qalora_plugin.checkpoint.adapter_folder import CONFIG_NAME
from qalora_plugin.checkpoint.atomic import new_folder, require_space
from qalora_plugin.checkpoint.companions import copy_companions
from qalora_plugin.checkpoint.folder import SINGLE_NAME, Checkpoint
from qalora_plugin.checkpoint.hub import expanded
from qalora_plugin.checkpoint.places import require_place
from qalora_plugin.conversion.import_adapter import ImportedAdapter, import_adapter
from qalora_plugin.conversion.writer import Array, write_model
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.progress import track
from qalora_plugin.formats.gptq_zeros import V2
from qalora_plugin.formats.lora_folder import to_safetensors
from qalora_plugin.formats.official import OFFICIAL, OfficialMerge, tell_reading
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.qalora import QALora

if TYPE_CHECKING:
    from torch import Tensor

_ASKED = 16  # linears that tell what the float zero-points mean


@dataclass(frozen=True)
class ImportedMerge:
    """What was written: the folder, how many linears have offsets, and what its float zero-points were taken for."""

    folder: Path
    modules: int
    reading: str

    def summary(self) -> list[str]:
        return [f"{self.folder}: {self.modules} linears with float32 offsets; its float qzeros are {self.reading}"]


@os_errors_in_one_line()
def import_official(
    src: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> ImportedAdapter | ImportedMerge:
    """Write an adapter, or a merged checkpoint, of the official repository as one of ours.

    Args:
        src: folder of an adapter (``adapter_config.json``), or of a model merged by ``merge.py``.
        out: new folder; complete or absent.
        base: folder or Hub id of the GPTQ base. An adapter needs it, by default what its config names; of a merged
            checkpoint it gives the zero-points, and settles what the float ones mean.

    Raises:
        QALoraError: it is neither, pickled, of another base, or what its float zero-points mean cannot be told.
    """
    folder = expanded(src)
    if (folder / CONFIG_NAME).is_file():
        return import_adapter(OFFICIAL, src, out, base, revision, progress)
    _refuse_pickles(folder)
    out = require_place(out, src, "the output")
    files = Checkpoint.open(src)
    merged = OfficialMerge(files.quantization, files.tensors, files.folder)
    merged.check_values(files.array, files.folder)
    source = None if base is None else QuantizedCheckpoint.open(base, revision)
    if source is not None:
        _require_base(files, merged, source)
    reading = _tell_reading(files, merged, source)
    specs = list(merged.specs.values())
    quantization = {
        "quant_method": QALora.method,
        "bits": specs[0].bits,
        "group_size": files.quantization.get("group_size", specs[0].group_size),  # −1 stands for K, of any linear
        "desc_act": False,
        "sym": source is not None and source.symmetric,
        "checkpoint_format": V2,
        "offset_dtype": "float32",
    }
    require_space(out.parent, files.nbytes + sum(4 * spec.groups * spec.out_features for spec in specs))
    with new_folder(out) as work:
        write_model(work, files.config, quantization, _tensors(files, merged, source, reading, progress))
        copy_companions(files.folder, files.folder, work)
    return ImportedMerge(out, len(specs), reading)


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path for pattern in ("*.bin", "*.pt") for path in folder.glob(pattern))
    if not pickles or any(folder.glob("*.safetensors")):
        return
    if len(pickles) > 1:
        names = ", ".join(path.name for path in pickles)
        raise QALoraError(
            f"{folder} holds several pickles ({names}), which can run code when opened and are never read. Convert "
            f"those that are its weights into one {SINGLE_NAME}, as this does with one: "
            f"{to_safetensors(pickles[0], folder / SINGLE_NAME)}"
        )
    raise QALoraError(
        f"{folder} holds its weights as a pickle ({pickles[0].name}), which can run code when opened and is never "
        f"read. Convert it: {to_safetensors(pickles[0], folder / SINGLE_NAME)}"
    )


def _require_base(files: Checkpoint, merged: OfficialMerge, base: QuantizedCheckpoint) -> None:
    """Refuse a base of other codes or scales: a merge changes neither."""
    for name, spec in merged.specs.items():
        theirs = base.specs.get(name)
        same = theirs is not None and (theirs.bits, theirs.group_size) == (spec.bits, spec.group_size)
        for part in ("qweight", "scales"):
            stored = f"{name}.{part}"
            if not same or not _equal(files.tensor(stored), base.files.tensor(stored)):
                raise QALoraError(
                    f"{files.folder} is no merge onto {base.folder}: {stored} differs, which merge.py never touches. "
                    "Pass the base that it was merged from, or none."
                )


def _equal(one: "Tensor", other: "Tensor") -> bool:
    return one.dtype == other.dtype and one.equal(other)


def _tell_reading(files: Checkpoint, merged: OfficialMerge, base: QuantizedCheckpoint | None) -> str:
    specs = list(merged.specs.values())
    asked = specs[:: -(-len(specs) // _ASKED)]
    zeros = {spec.name: None if base is None else base.weight(spec.name).zeros for spec in asked}
    distances = (merged.distances(spec, files.tensor, zeros[spec.name]) for spec in asked)
    return tell_reading(distances, files.folder)


def _tensors(
    files: Checkpoint, merged: OfficialMerge, base: QuantizedCheckpoint | None, reading: str, progress: bool
) -> Iterator[tuple[str, Array]]:
    """Everything that is to be written, in checkpoint order, one linear at a time."""
    ours = QALora({"checkpoint_format": V2})
    replaced = {f"{name}.{part}" for name in merged.specs for part in ("qweight", "qzeros", "scales", "g_idx")}
    for name in track(list(files.tensors), "importing", shown=progress):
        module = name.removesuffix(".qweight")
        if name.endswith(".qweight") and module in merged.specs:
            spec = merged.specs[module]
            zeros = None if base is None else base.weight(module).zeros
            weight = merged.read(spec, files.tensor, reading, zeros)
            yield from ours.write(module, weight, g_idx=spec.has_g_idx).items()
        elif name not in replaced:
            yield name, files.tensor(name)
