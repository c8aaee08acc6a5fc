"""The linears of a layer's experts, by the names of the checkpoint."""

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec

_ROLES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3", "w1": "w1", "w2": "w2", "w3": "w3"}


def by_expert(modules: dict[str, GroupwiseSpec], experts: int, prefix: str) -> list[dict[str, GroupwiseSpec]]:
    """Of every expert its ``w1`` (gate), ``w2`` (down) and ``w3`` (up).

    Args:
        modules: by their names in the layer, ``0.gate_proj`` … experts: how many the layer has.
        prefix: its name in the vLLM model, for messages.

    Raises:
        QALoraError: experts are missing, or quantized differently.
    """
    found: list[dict[str, GroupwiseSpec]] = [{} for _ in range(experts)]
    for name, spec in modules.items():
        number, _, leaf = name.partition(".")
        if leaf not in _ROLES or not number.isdigit() or int(number) >= experts:
            raise QALoraError(
                f"{spec.name} is no expert that {prefix} has ({experts} of them, each gate_proj, up_proj, down_proj or "
                "w1, w3, w2). Does config.json belong to these weights?"
            )
        found[int(number)][_ROLES[leaf]] = spec
    for i, one in enumerate(found):
        if missing := sorted({"w1", "w2", "w3"} - set(one)):
            raise QALoraError(
                f"{prefix}: expert {i} lacks a quantized {missing[0]}, but a layer's experts must be quantized all, or "
                "none. Download or quantize the checkpoint again."
            )
    for role in ("w1", "w2"):  # w3 is held against w1 where they become one linear
        kinds = {(one[role].bits, one[role].group_size) for one in found}
        if len(kinds) > 1:
            raise QALoraError(
                f"{prefix}: its experts are quantized differently ({sorted(kinds)}: bits, group size). Quantize the "
                "base again with equal settings for them."
            )
    return found
