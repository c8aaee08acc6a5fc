"""Which linears vLLM runs as one layer, and whether a checkpoint quantises them alike, as it then must. And what else
keeps it from serving one, as far as names and sizes tell."""

from collections.abc import Iterable
from typing import Any

from qalora_plugin.checkpoint.module_names import is_expert
from qalora_plugin.core.weight import GroupwiseSpec

FUSED = (  # by their names in transformers, in vLLM 0.32
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_SERVED_AS = {FUSED[0]: "qkv_proj", FUSED[1]: "gate_up_proj"}  # what vLLM calls them, where readers must know
_OWN_EXPERTS = ("deepseek_v4", "minimax_m3_vl", "minimax_m3_vl_text")  # model types; read in vLLM 0.32

# Classes of vLLM 0.32 whose own loading code cannot take packed weights, quantised by whomever.
_CLASSES = {
    "BloomForCausalLM": "vLLM reorders the rows of query_key_value while loading, but packed rows run along the input",
    "MiniCPM3ForCausalLM": "vLLM builds q_a_proj without a name, so nothing tells that it is quantised",
    "DeepseekForCausalLM": "vLLM builds its attention's linears without names, so nothing tells what is quantised",
    "Molmo2ForConditionalGeneration": "vLLM builds its linears without names, so nothing tells what is quantised",
}


def class_problem(name: object) -> str | None:
    """Why vLLM's class of this name takes no quantised model; None: as far as is known it does."""
    if not isinstance(name, str) or name not in _CLASSES:
        return None
    return (
        f"vLLM cannot serve a quantised {name}: {_CLASSES[name]}. Serve it with transformers, or serve the "
        "16-bit model with the adapter exported by `qalora export lora`."
    )


def unservable(
    modules: dict[str, GroupwiseSpec], dense: Iterable[str] = (), config: dict[str, Any] | None = None
) -> str | None:
    """Why vLLM cannot serve such a checkpoint; None if it can, as far as fused layers and experts go.

    Args:
        modules: the quantised linears. dense: names of the modules that have a dense weight.
        config: the model's.
    """
    config = config or {}
    model_type, classes = config.get("model_type"), config.get("architectures")
    for name in classes if isinstance(classes, list) else ():
        if reason := class_problem(name):
            return reason
    dense = set(dense)
    if biased := next((name for name, spec in modules.items() if spec.bias_dtype and is_expert(name)), None):
        return (
            f"vLLM cannot serve quantized experts that have biases, as {biased} has. It trains and merges; serve the "
            "result with transformers."
        )
    if model_type in _OWN_EXPERTS and (expert := next(filter(is_expert, modules), None)):
        return (
            f"vLLM computes the experts of {model_type} by a class of its own, which takes none that are quantized as "
            f"{expert} is. It trains and merges; serve the result with transformers."
        )
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        parts = next((fused for fused in FUSED if leaf in fused), ())
        names = [f"{parent}.{part}".lstrip(".") for part in parts]
        found = [modules[part] for part in names if part in modules]
        kinds = {f"{module.bits} bit, group size {module.group_size}" for module in found}
        left_dense = sorted(dense.intersection(names))
        if len(kinds) > 1 or (found and left_dense):
            listed = ", ".join(
                f"{module.name} ({module.bits} bit, group size {module.group_size})" for module in found
            ) + "".join(f", {part} (dense)" for part in left_dense)
            return (
                f"vLLM runs {', '.join(parts)} as one layer, but this base quantises them differently: {listed}. It "
                "trains and merges, and transformers loads the result; to serve it in vLLM, quantise the base again "
                "with equal settings for them."
            )
    return None


def served_names(names: Iterable[str]) -> list[str]:
    """What vLLM calls the layers that it makes of linears which are all among ``names``."""
    names, found = set(names), []
    for name in sorted(names):
        parent, dot, leaf = name.rpartition(".")
        for parts, served in _SERVED_AS.items():
            if leaf == parts[0] and all(f"{parent}{dot}{part}" in names for part in parts):
                found.append(f"{parent}{dot}{served}")
    return found


def dense_modules(tensors: Iterable[str]) -> list[str]:
    """Modules that the tensors' names give a dense weight."""
    return [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
