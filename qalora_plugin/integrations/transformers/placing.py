"""Which layer of a transformers model each quantised linear of a checkpoint is, and putting a ``QuantLinear`` there."""

import inspect
import re
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.integrations.transformers.naming import Destination, destinations, is_ignored
from qalora_plugin.integrations.transformers.stored_tensors import expect_stored
from qalora_plugin.layers.linear import QuantLinear, ReadableQuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Forward passes that are x·W + bias and nothing else. (Falcon's writes the same product out by hand.)
_PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)
_PLAIN_CLASSES = ("FalconLinear",)


def place_linears(
    model: "PreTrainedModel", checkpoint: QuantizedCheckpoint, found: dict[str, Destination], placed: set[str]
) -> dict[str, str]:
    """Replace the linears that the checkpoint quantises; buffers are on the meta device, for the loader to fill.

    Args:
        found: where the ``weight`` of each would go.
        placed: names on disk of those that have their place already: experts.

    Returns:
        Name in the model → name on disk, of every replaced linear. GPT-2's ``Conv1D`` is one of them: GPTQ stores
        ``[K, N]`` words whichever way round the dense weight was.

    Raises:
        QALoraError: a quantised linear that is none of the model's, or that its class would not use as a linear.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    names = {}
    for stored, spec in checkpoint.specs.items():
        if stored in placed:
            continue
        destination = found[f"{stored}.weight"]
        name = destination.name.removesuffix(".weight")
        linear = linears.get(name)
        if linear is None and (is_ignored(model, f"{stored}.weight") or is_ignored(model, destination.name)):
            continue
        if linear is None or destination.converted:
            raise QALoraError(_why_no_linear(model, stored, destination))
        if destination.name in tied:
            raise QALoraError(
                f"the checkpoint quantises {stored}, whose weight {type(model).__name__} shares between layers: "
                "one adapter could not be on all of them. Leave it dense when quantising."
            )
        _require_same_linear(stored, spec, linear, model.config.model_type)
        packed = (ReadableQuantLinear if _is_read_by_mixer(model, name) else QuantLinear)(spec)
        expect_stored(packed, spec, checkpoint.format, checkpoint.files.tensors)
        if isinstance(packed, ReadableQuantLinear):
            packed.weight_dtype = linear.weight.dtype
        model.set_submodule(name, packed)
        names[name] = stored
    return names


def require_every_tensor(model: "PreTrainedModel", checkpoint: Checkpoint, names: dict[str, str], rules: list) -> None:
    """Refuse to go on where transformers' rules would leave part of a packed linear unloaded, which it fills at random.

    Args:
        names: of the packed linears, in the model → on disk. rules: what this load renames by.
    """
    wanted = {
        f"{stored}.{part}": f"{name}.{part}"
        for name, stored in names.items()
        for part in model.get_submodule(name).state_dict()
    }
    for key, destination in destinations(model, wanted, rules).items():
        if destination.name != wanted[key] or key not in checkpoint.tensors:
            raise QALoraError(
                f"{key} would be loaded as {destination.name}, expected {wanted[key]}: transformers renames this layer "
                f"of {type(model).__name__} in a way that does not suit packed weights. Leave the layer dense when "
                "quantising, and report this."
            )


def _why_no_linear(model: "PreTrainedModel", stored: str, destination: Destination) -> str:
    head = f"the checkpoint quantises {stored}, but {type(model).__name__} "
    name = destination.name.removesuffix(".weight")
    parts = name.split(".")
    experts = ".".join(parts[: parts.index("experts") + 1]) if "experts" in parts else None
    if experts and experts in dict(model.named_modules()):
        return (
            f"{head}holds the experts of a mixture-of-experts layer in a way ({experts}) that packed ones do not fit "
            "into. Leave the experts dense when quantising."
        )
    if destination.converted:
        return (
            f"{head}has {name} there: transformers splits, fuses or turns this layer's weight while loading, which "
            "packed words do not survive. Leave the layer dense when quantising."
        )
    try:
        found = f"a {type(model.get_submodule(name)).__name__} there"
    except AttributeError:
        found = f"nothing named {name}"
    linears = [other for other, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    leaf = name.rpartition(".")[2]
    alike = next((other for other in linears if other.rpartition(".")[2] == leaf), next(iter(linears), "none"))
    return f"{head}has no such linear layer ({found}; its own are named like {alike}). Is config.json another model's?"


def _require_same_linear(stored: str, spec: GroupwiseSpec, linear: nn.Module, model_type: str) -> None:
    if model_type == "rwkv":
        raise QALoraError(
            f"{stored} cannot be packed: RWKV rescales its weights in place between training and evaluation. "
            "Use another architecture."
        )
    if stored.endswith("weights_proj"):  # of DeepSeek's sparse attention, which asks for its dtype
        raise QALoraError(f"{stored} is asked for its dense weight's dtype. Leave it dense when quantising.")
    if type(linear).forward not in _PLAIN_FORWARDS and type(linear).__name__ not in _PLAIN_CLASSES:
        raise QALoraError(
            f"{stored} is a {type(linear).__name__}, which computes more than a linear layer. Leave it dense when "
            "quantising."
        )
    if isinstance(linear, nn.Linear):
        in_features, out_features = linear.in_features, linear.out_features
    else:
        shape: Any = linear.weight.shape
        in_features, out_features = shape
    if (in_features, out_features) != (spec.in_features, spec.out_features):
        raise QALoraError(
            f"{stored} is {spec.in_features}×{spec.out_features} in the checkpoint, but "
            f"{in_features}×{out_features} by config.json. They do not belong together."
        )


def _is_read_by_mixer(model: "PreTrainedModel", name: str) -> bool:
    """True if the parent is a Mamba mixer whose code reads ``self.<leaf>.weight``. Only its source tells."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    if not hasattr(parent, "A_log"):
        return False
    return re.search(rf"self\.{leaf}\.weight\b", inspect.getsource(type(parent))) is not None
