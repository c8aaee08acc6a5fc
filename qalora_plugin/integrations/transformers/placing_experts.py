"""Quantized experts of a checkpoint → the module that transformers 5 stacks them in, replaced by a packed one.

On disk every expert is a linear of its own: ``…experts.E.{gate,up,down}_proj`` as GPTQModel writes all models, or with
the older names of Mixtral and its like, ``…experts.E.{w1,w3,w2}``. transformers would fuse dense ones into two tensors
while loading. Packed ones are kept away from that: its loader is told to leave them, and :func:`read_experts` takes
them from disk, expert by expert.

What a family computes between gate and up, and down, its own class says (``_apply_gate``), over both in one tensor.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.base import CheckpointFormat
from qalora_plugin.formats.gptq import is_act_order
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.provenance import quantizers
from qalora_plugin.formats.qalora import FACTORS, SCALES
from qalora_plugin.integrations.transformers.naming import Destination, is_ignored
from qalora_plugin.layers.experts import QuantExpertLinear, QuantExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROLES = {
    "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj",
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
}  # fmt: skip
_NAME = re.compile(r"(?P<parent>(?:.+\.)?experts)\.(?P<expert>\d{1,5})\.(?P<leaf>\w+)")
_PARTS = r"\.experts\.\d+\.\w+\.(qweight|qzeros|scales|g_idx|bias|offsets|offsets_a|offsets_b|scales_delta)$"


@dataclass(frozen=True)
class Projection:
    """One projection of all experts of a layer.

    Attributes:
        leaf: its name on disk. specs: of every expert, in order.
    """

    leaf: str
    specs: list[GroupwiseSpec]

    @property
    def stored(self) -> str:
        """Its name on disk but for the number of the expert: ``model.layers.0.mlp.experts.w1``."""
        return f"{self.specs[0].name.rsplit('.', 2)[0]}.{self.leaf}"


def has_experts(checkpoint: QuantizedCheckpoint) -> bool:
    """Whether any of its quantized linears is one of several experts by its name."""
    return any(_NAME.fullmatch(name) for name in checkpoint.specs)


def place_experts(
    model: "PreTrainedModel", checkpoint: QuantizedCheckpoint, found: dict[str, Destination]
) -> dict[str, Projection]:
    """Replace the stacked experts that the checkpoint quantizes; buffers are on the meta device.

    Args:
        found: where the ``weight`` of each quantized linear would go.

    Returns:
        The projections by their names in the model, ``model.layers.0.mlp.experts.gate_proj`` …

    Raises:
        QALoraError: experts that are missing, unknown, dense or quantized differently; a class that computes something
            else with them than ``down(combine(gate, up))``; or one whose gate and up no one can tell apart.
    """
    modules = dict(model.named_modules())
    layers: dict[str, dict[str, dict[int, GroupwiseSpec]]] = {}  # by module, role and expert
    for stored, spec in checkpoint.specs.items():
        destination = found[f"{stored}.weight"]
        match = _NAME.fullmatch(stored)
        path, inside, _ = destination.name.rpartition(".experts.")
        path += ".experts"
        if not match or not inside or not _is_stacked(modules.get(path)):
            continue
        if is_ignored(model, f"{stored}.weight") or is_ignored(model, destination.name):
            continue
        if match["leaf"] not in _ROLES:
            raise QALoraError(
                f"the checkpoint quantizes {stored}, but experts have {', '.join(sorted(_ROLES))}. Is config.json "
                "another model's?"
            )
        by_expert = layers.setdefault(path, {}).setdefault(_ROLES[match["leaf"]], {})
        number = int(match["expert"])
        if number in by_expert:
            raise QALoraError(f"{stored} and {by_expert[number].name} are the same weight of {path}. Keep one of them.")
        by_expert[number] = spec
    placed: dict[str, Projection] = {}
    for path, roles in layers.items():
        projections = _projections(model, path, modules[path], roles, checkpoint)
        linears = {
            role: QuantExpertLinear(one.specs, _act_order(one, checkpoint), device="meta")
            for role, one in projections.items()
        }
        model.set_submodule(path, QuantExperts(**linears, combine=_combine_of(modules[path])))
        placed |= {f"{path}.{role}": one for role, one in projections.items()}
    if placed:
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), _PARTS}
    return placed


def read_experts(layer: QuantExpertLinear, projection: Projection, checkpoint: QuantizedCheckpoint) -> None:
    """Fill a layer from disk."""
    if layer.qweight.is_meta:
        raise QALoraError(
            f"the experts {projection.stored} were given no memory: offloading them is not supported. Load the model "
            "onto one kind of device."
        )
    for i, spec in enumerate(projection.specs):
        factors = None
        if spec.offset_rank:
            a, b = (checkpoint.files.tensor(f"{spec.name}.{part}") for part in FACTORS)
            factors = a, b
        weight, change = checkpoint.weight(spec.name), None
        if spec.scales_delta_dtype:
            scales, change = (checkpoint.files.tensor(f"{spec.name}.{part}") for part in SCALES)
            weight = weight._replace(scales=scales)
        bias = checkpoint.files.tensor(f"{spec.name}.bias") if spec.bias_dtype else None
        layer.put(i, weight, factors, change, bias)


def experts_as_stored(
    layer: QuantExpertLinear, name: str, projection: Projection, fmt: CheckpointFormat
) -> dict[str, Tensor]:
    """Every expert of ``layer``, called ``name``, as it was loaded."""
    parent = name.rpartition(".")[0]
    state: dict[str, Tensor] = {}
    held = layer.named_tensors()
    a, b, bias = held["offsets_a"], held["offsets_b"], held["bias"]
    for i, spec in enumerate(projection.specs):
        weight, stored = layer.expert(i), f"{parent}.{i}.{projection.leaf}"
        if spec.offset_dtype is None or spec.offset_rank:
            weight = weight._replace(offsets=None)
        state |= fmt.write(stored, weight, g_idx=spec.has_g_idx)
        if spec.offset_rank and a is not None and b is not None:
            state[f"{stored}.offsets_a"] = a[i, :, : spec.offset_rank].contiguous()
            state[f"{stored}.offsets_b"] = b[i, : spec.offset_rank].contiguous()
        if spec.scales_delta_dtype:
            state |= {f"{stored}.{part}": tensor[i] for part in SCALES if (tensor := held[part]) is not None}
        if spec.bias_dtype and bias is not None:
            state[f"{stored}.bias"] = bias[i]
    return state


def _is_stacked(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.ModuleList) and hasattr(module, "down_proj")


def _combine_of(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """What a family's class makes of gate and up."""
    if _multiplies(module):
        return partial(_multiplied, module.act_fn)
    for name in list(module._parameters):
        delattr(module, name)  # kept for its settings alone
    return partial(_by_its_class, module)


def _multiplies(module: Any) -> bool:
    return getattr(type(module)._apply_gate, "__name__", "") == "_default_apply_gate"


def _multiplied(act_fn: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act_fn(gate) * up


def _by_its_class(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    return module._apply_gate(torch.cat((gate, up), -1))


def _projections(
    model: "PreTrainedModel", path: str, module: nn.Module, roles: dict[str, dict[int, GroupwiseSpec]],
    checkpoint: QuantizedCheckpoint,
) -> dict[str, Projection]:  # fmt: skip
    """Every projection with all its experts, held against each other and against the module."""
    example = next(iter(next(iter(roles.values())).values())).name
    parent = example.rsplit(".", 2)[0]
    family = f"the experts of {type(model).__name__} ({type(module).__name__})"
    if not getattr(module, "has_gate", False) or not hasattr(module, "_apply_gate"):
        raise QALoraError(
            f"the checkpoint quantizes {example}, but {family} compute something else than a down projection of what "
            "gate and up give. Leave the experts dense when quantizing."
        )
    if not module.is_concatenated and not any(
        name.startswith("gptqmodel:") for name in quantizers(checkpoint.files.quantization)
    ):
        # Columns of gate and up alternate in their dense weight. GPTQModel (Defuser) calls its two halves gate_proj and
        # up_proj, and gives the class's own gate both joined again, as we do; other tools so call even and odd columns.
        raise QALoraError(
            f"{checkpoint.folder} quantizes {family}, whose gate and up tools tell apart in two ways, and its "
            "quantization_config does not say that GPTQModel did (meta.quantizer). Quantize it with GPTQModel: qalora "
            "quantize MODEL OUT."
        )
    experts, *sizes_of_down = cast(Tensor, module.down_proj).shape
    hidden, inner = reversed(sizes_of_down) if module.is_transposed else sizes_of_down
    sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
    projections = {}
    for role, (k, n) in sizes.items():
        by_expert = roles.get(role, {})
        if unknown := sorted(set(by_expert) - set(range(experts))):
            raise QALoraError(
                f"the checkpoint quantizes {by_expert[unknown[0]].name}, but {path} has {experts} experts by "
                "config.json. They do not belong together."
            )
        if missing := sorted(set(range(experts)) - set(by_expert)):
            leaf = next(iter(by_expert.values())).name.rpartition(".")[2] if by_expert else role
            lacking = f"{parent}.{missing[0]}.{leaf}"
            left = "left dense" if f"{lacking}.weight" in checkpoint.files.tensors else "missing"
            raise QALoraError(
                f"{len(missing)} of {experts} experts of {parent} lack a quantized {role} ({lacking} is {left}): a "
                "layer's experts must be quantized all, or none. Quantize the base again, or download it again."
            )
        specs = [by_expert[i] for i in range(experts)]
        _require_alike(specs, (k, n), bool(module.has_bias))
        projections[role] = Projection(specs[0].name.rpartition(".")[2], specs)
    return projections


def _require_alike(specs: list[GroupwiseSpec], sizes: tuple[int, int], has_bias: bool) -> None:
    first = specs[0]
    for spec in specs:
        if (spec.bits, spec.group_size) != (first.bits, first.group_size):
            raise QALoraError(
                f"{first.name} has {first.bits} bits and groups of {first.group_size}, {spec.name} {spec.bits} bits "
                f"and groups of {spec.group_size}: the experts of a layer must be quantized alike. Quantize the base "
                "again without rules of their own for single experts."
            )
        if (spec.in_features, spec.out_features) != sizes:
            raise QALoraError(
                f"{spec.name} is {spec.in_features}×{spec.out_features} in the checkpoint, but {sizes[0]}×{sizes[1]} "
                "by config.json. They do not belong together."
            )
        if spec.bias_dtype and not has_bias:
            raise QALoraError(
                f"{spec.name} has a bias, which the experts of this model have no place for. Leave the experts dense."
            )
        if has_bias and not spec.bias_dtype:
            raise QALoraError(f"{spec.name}.bias is missing, which the experts of this model have. Download it again.")
        if spec.name.rpartition(".")[2] != first.name.rpartition(".")[2]:
            raise QALoraError(f"{first.name} and {spec.name} name one projection differently. Save the base again.")


def _act_order(projection: Projection, checkpoint: QuantizedCheckpoint) -> bool:
    return any(is_act_order(spec, checkpoint.files.array) for spec in projection.specs)
