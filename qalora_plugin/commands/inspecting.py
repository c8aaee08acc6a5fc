"""`qalora inspect`: what a checkpoint is, whether it can be a base, and what an adapter on it would cost."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qalora_plugin.checkpoint.adapter_folder import is_adapter_folder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.hub import expanded, is_local
from qalora_plugin.conversion.added import added_bytes, merged_spec, usual_dtype
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.eval.tables import print_facts
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.served_bits import kinds, served_bits


@dataclass(frozen=True)
class InspectReport:
    """Facts read off the tensors. Sizes in bytes; counts are numbers of linears or parameters."""

    path: str
    quant_method: str | None
    can_be_base: bool
    why_not: str | None
    size: int
    quantised: int = 0
    kinds: tuple[str, ...] = ()
    symmetric: bool | None = None
    act_order: bool | None = None
    zeros: str | None = None
    with_offsets: int = 0
    with_factored_offsets: int = 0
    with_changed_scales: int = 0
    dense: tuple[str, ...] = ()
    rank: int = 0
    trainable_parameters: int = 0
    adapter_size: int = 0
    merged_extra: int = 0
    merged_dtype: str = "float16"
    served_bits: float = 0.0  # a weight, all included
    served: str = ""

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def print(self) -> None:
        rows = [("quantisation", self.quant_method or "none (dense)"), ("size", f"{self.size / 1e6:.1f} MB")]
        if self.quantised:
            rows += [
                ("quantised linears", f"{self.quantised}: {'; '.join(self.kinds)}"),
                ("zero-points", f"{'symmetric' if self.symmetric else 'asymmetric'}, stored as {self.zeros}"),
                ("act-order", "yes" if self.act_order else "no"),
                ("left dense", ", ".join(self.dense) or "nothing"),
                ("served bits", self.served),
            ]
        if self.with_offsets:
            factored = f", factored on {self.with_factored_offsets}" if self.with_factored_offsets else ""
            rows.append(("offsets", f"on {self.with_offsets} linears{factored}"))
        if self.with_changed_scales:
            rows.append(("changed scales", f"on {self.with_changed_scales} linears"))
        rows.append(("can be a base", "yes" if self.can_be_base else f"no: {self.why_not}"))
        if self.can_be_base:
            more = f"{self.merged_extra / self.size:.1%}, {self.merged_dtype}"
            rows += [
                (f"trainable at rank {self.rank}", f"{self.trainable_parameters / 1e6:.2f} M (all quantised linears)"),
                ("adapter on disk", f"{self.adapter_size / 1e6:.1f} MB (float32)"),
                ("a merge writes", f"{self.merged_extra / 1e6:.1f} MB ({more})"),
            ]
        print_facts(f"qalora inspect {self.path}", rows)


@os_errors_in_one_line()
def inspect(path: str | Path, rank: int = 16) -> InspectReport:
    """Look at a local checkpoint.

    Args:
        rank: adapter rank R for which to count parameters: R·(G + N) a linear.

    Raises:
        QALoraError: the folder is no readable checkpoint at all.
    """
    folder = expanded(path)
    if not is_local(path):
        raise QALoraError(f"{path} {_why_no_folder(folder)}")
    if is_adapter_folder(folder):
        raise QALoraError(f"{path} is an adapter's folder. Inspect its base, or measure it: qalora eval.")
    checkpoint, source, why_not = Checkpoint.open(path), None, None
    try:
        source = QuantizedCheckpoint.of(checkpoint)
        source.check_values()
        source.check_dense_values()
        from qalora_plugin.integrations.transformers.outline import outline, why_not_built  # imports transformers

        why_not = why_not_built(source) if outline(source) is None else None
    except QALoraError as error:
        why_not = str(error)
    report: dict[str, Any] = {
        "path": str(path),
        "quant_method": checkpoint.method,
        "can_be_base": why_not is None,
        "why_not": why_not,
        "size": checkpoint.nbytes,
    }
    if source is not None:
        specs = source.specs.values()
        served = served_bits(specs, source.act_order)
        dtype = usual_dtype(specs)
        parameters = sum(rank * (spec.groups + spec.out_features) for spec in specs)
        report |= {
            "quantised": len(specs),
            "kinds": kinds(specs),
            "symmetric": source.symmetric,
            "act_order": source.act_order,
            "zeros": source.format.reading,
            "with_offsets": sum(spec.offset_dtype is not None for spec in specs),
            "with_factored_offsets": sum(spec.offset_rank > 0 for spec in specs),
            "with_changed_scales": sum(spec.scales_delta_dtype is not None for spec in specs),
            "dense": tuple(sorted(_dense_matrices(checkpoint))),
            "rank": rank,
            "trainable_parameters": parameters,
            "adapter_size": 4 * parameters,
            "merged_extra": sum(added_bytes(merged_spec(spec, rank, dtype)) for spec in specs),
            "merged_dtype": dtype,
            "served_bits": served.bits_a_weight,
            "served": str(served),
        }
    return InspectReport(**report)


def made_of(base: Path) -> str:
    """Of a base that was just made: how its linears are quantized, and what they take."""
    source = QuantizedCheckpoint.open(base)
    specs = source.specs.values()
    return f"{'; '.join(kinds(specs))}; {served_bits(specs, source.act_order)}"


def _why_no_folder(path: Path) -> str:
    if path.suffix == ".gguf" and path.is_file():
        return "is a GGUF file. Make a base of it: qalora import gguf FILE OUT"
    if path.exists():
        return "is a file, expected a model folder. Pass the folder that holds config.json."
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", ".."):
        return "does not exist. Pass a local model folder."
    return f"is not a local folder. Download it first: hf download {path} --local-dir FOLDER"


def _dense_matrices(checkpoint: Checkpoint) -> set[str]:
    """Names of two-dimensional ``.weight`` tensors: embeddings, heads, excluded linears."""
    return {
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
