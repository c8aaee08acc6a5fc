"""A pooled LoRA of another project → an adapter of ours, bound to its base, equal in what it adds.

Their pooling is ours times a factor f that depends on the linear, and may be wider than the base's groups:

    f·(sum over p columns) = f·P(x)·Rᵀ      R repeats: p = m·g, group γ of the base lies in pooled group γ // m

so ``A → A·R`` (its columns repeated m times) and ``B → f·B``, the product in float64, rounded to float32 once. α/R, its
patterns and rsLoRA stay in the config as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qalora_plugin.checkpoint.adapter_config import ADAPTER_FORMAT, POOLING
from qalora_plugin.checkpoint.adapter_folder import CONFIG_NAME, PEFT_TYPE, WEIGHTS_NAME, AdapterFolder
from qalora_plugin.checkpoint.atomic import new_folder, require_space
from qalora_plugin.checkpoint.hub import expanded
from qalora_plugin.checkpoint.json_files import write_json
from qalora_plugin.checkpoint.places import require_place
from qalora_plugin.checkpoint.tensors import all_finite
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.progress import track
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.gptq import is_act_order
from qalora_plugin.formats.lora_folder import PooledLora
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.peft_qalora import PEFT_QALORA

_KEPT = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "task_type")


@dataclass(frozen=True)
class ImportedAdapter:
    """What was written: the folder, how many linears it adapts, their highest rank, columns pooled together."""

    folder: Path
    base: str
    kind: str
    modules: int
    max_rank: int
    pooled: int

    def summary(self) -> list[str]:
        return [
            f"{self.folder}: {self.modules} linears, rank {self.max_rank}; {self.kind} pooled {self.pooled} columns, "
            "its factor is in B now",
            f"nothing in it says which base it was trained on: {self.base} is on your word",
        ]


def import_peft(
    adapter: str | Path, out: str | Path, base: str | Path | None = None, revision: str | None = None
) -> ImportedAdapter:
    """Write a PEFT ``use_qalora`` adapter as one of ours; see :func:`import_adapter`."""
    return import_adapter(PEFT_QALORA, adapter, out, base, revision)


@os_errors_in_one_line()
def import_adapter(
    kind: PooledLora,
    adapter: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> ImportedAdapter:
    """Write ``adapter`` as an adapter folder of ours.

    Args:
        kind: how it pools.
        adapter: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        out: new folder; complete or absent.
        base: folder or Hub id of the base it was trained on; default: the one that its config names.

    Raises:
        QALoraError: it is of another kind, pickled, does not fit the base, or pools across the base's groups.
    """
    folder = expanded(adapter)
    config = kind.read_config(folder)
    base = base or config.get("base_model_name_or_path")
    if not isinstance(base, str | Path) or not base:
        raise QALoraError(f"the adapter {folder} does not name its base. Pass it: --base BASE.")
    out = require_place(out, base, "the output")
    source = QuantizedCheckpoint.open(base, revision)
    source.check_values()
    bound = _bound_config(config, source, str(base))
    opened = AdapterFolder.of(folder, bound)
    repeats = {name: _repeats(kind, opened, source, name, kind.pooled(config)) for name in opened.modules}
    bound["target_modules"] = opened.modules
    specs = [source.specs[name] for name in opened.modules]
    group_sizes = {spec.group_size for spec in specs}
    bound["qalora"]["group_size"] = group_sizes.pop() if len(group_sizes) == 1 else None

    def factors() -> Iterator[tuple[str, np.ndarray]]:
        for name in track(opened.modules, "importing", shown=progress):
            yield from zip(_keys(name), _converted(kind, opened, source.specs[name], repeats[name]), strict=True)

    size = sum(4 * opened.rank(spec.name) * (spec.groups + spec.out_features) for spec in specs)
    require_space(out.parent, size + (1 << 20))
    with new_folder(out) as work:
        save_file(dict(factors()), work / WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(work / CONFIG_NAME, bound)
        AdapterFolder.open(work).check_fits(source.specs)
    pooled = specs[0].group_size * repeats[opened.modules[0]]
    return ImportedAdapter(out, str(base), kind.name, len(specs), max(map(opened.rank, opened.modules)), pooled)


def _bound_config(config: dict[str, Any], base: QuantizedCheckpoint, named: str) -> dict[str, Any]:
    """``adapter_config.json`` as our trainer saves it, without the targets, which are the tensors' names."""
    bound = {key: config[key] for key in _KEPT if config.get(key) is not None}
    qalora = {
        "format_version": ADAPTER_FORMAT,
        "pooling": POOLING,
        "group_size": None,
        "base_fingerprint": base.fingerprint(),
    }
    architectures = base.files.config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        qalora["model_class"] = architectures[0]
    return {
        **bound,
        "peft_type": PEFT_TYPE,
        "use_qalora": True,  # as our own: servers that know no peft_type must not take it for a LoRA
        "base_model_name_or_path": named,
        "bias": "none",
        "inference_mode": True,
        "qalora": qalora,
    }


def _repeats(kind: PooledLora, adapter: AdapterFolder, base: QuantizedCheckpoint, name: str, stated: int | None) -> int:
    """How many groups of the base each pooled group of one linear covers.

    Raises:
        QALoraError: it is not a whole number of groups, in their order, or A or B has another shape than it should.
    """
    spec = base.specs.get(name)
    if spec is None:
        raise QALoraError(
            f"{adapter.folder} adapts {name}, which {base.folder} does not quantise. Pass the base that it was trained "
            "on: --base BASE."
        )
    rank = adapter.rank(name)
    found_a, found_b = (adapter.tensors[key].shape for key in _keys(name))
    columns = found_a[-1] if found_a else 0
    if found_a != (rank, columns) or found_b != (spec.out_features, rank) or not columns or spec.in_features % columns:
        raise QALoraError(
            f"{adapter.folder}: lora_A of {name} is {found_a}, lora_B {found_b}; expected rank {rank}, "
            f"{spec.out_features} rows of B and a divisor of {spec.in_features} columns of A. Pass the base that it "
            "was trained on: --base BASE."
        )
    pooled = spec.in_features // columns
    if pooled == 1:
        raise QALoraError(
            f"{adapter.folder}: lora_A of {name} reads all {spec.in_features} columns: an ordinary LoRA, which does "
            "not pool and fits into no group's offset. It is served unmerged, by PEFT or vLLM."
        )
    if stated not in (None, pooled):
        raise QALoraError(
            f"{adapter.folder}: lora_A of {name} has {columns} columns for {spec.in_features} inputs, so it "
            f"pooled {pooled}, but its config says {stated}. One of the two is from another adapter."
        )
    if pooled % spec.group_size:
        raise QALoraError(
            f"{adapter.folder} pooled {pooled} columns of {name}, whose groups in {base.folder} have "
            f"{spec.group_size}: what it adds differs inside a group, which one offset cannot hold. Train with a "
            f"multiple of {spec.group_size}, or with `adapter: qalora`."
        )
    if is_act_order(spec, base.files.array):
        raise QALoraError(
            f"{base.folder} has {name} in act-order: its groups lie all over the columns, but {kind.name} pools "
            "neighbours, so what it adds differs inside a group. Quantise the base without act-order and train again, "
            "or train with `adapter: qalora`."
        )
    return pooled // spec.group_size


def _keys(name: str) -> tuple[str, str]:
    return f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight"


def _converted(
    kind: PooledLora, adapter: AdapterFolder, spec: GroupwiseSpec, repeats: int
) -> tuple[np.ndarray, np.ndarray]:
    """A ``[R, G]`` as stored, columns repeated, and ``f·B`` ``[N, R]`` in float32."""
    lora_a, lora_b = adapter.factors(spec.name)
    factor = kind.factor(spec.in_features, spec.group_size * repeats)
    with np.errstate(over="ignore"):
        lora_b = (factor * lora_b.astype(np.float64)).astype(np.float32)
    if not all_finite(lora_b):
        raise QALoraError(f"{adapter.folder}: B of {spec.name} exceeds what float32 can hold. The training diverged.")
    return np.repeat(lora_a, repeats, axis=1), lora_b
