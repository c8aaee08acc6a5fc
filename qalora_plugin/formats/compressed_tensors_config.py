"""What compressed-tensors' ``quantization_config`` says, and what of it a group-wise weight can hold.

(compressed-tensors ``quantization/quant_config.py``, ``quant_scheme.py``, ``quant_args.py``.)
"""

from typing import Any, NamedTuple

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.words import SUPPORTED_BITS
from qalora_plugin.formats.base import Unsupported

PACKED = "pack-quantized"
OTHERWISE = "Make a GPTQ checkpoint of the original 16-bit model: qalora quantize MODEL OUT."


class Scheme(NamedTuple):
    """How the weights of one of the ``config_groups`` are quantized; ``group_size`` None for one group over K."""

    bits: int
    group_size: int | None
    symmetric: bool

    def __str__(self) -> str:
        size = "one group" if self.group_size is None else f"group size {self.group_size}"
        return f"{self.bits} bit, {size}, {'symmetric' if self.symmetric else 'asymmetric'}"


def schemes(quantization: dict[str, Any], where: object) -> list[Scheme]:
    """The different settings of all ``config_groups``.

    Raises:
        Unsupported: activations, KV cache or weights are quantized in a way that GPTQ has no place for.
        QALoraError: there are no groups, or they are not what compressed-tensors writes.
    """
    if scheme := quantization.get("kv_cache_scheme"):
        raise Unsupported(f"{where} quantizes the KV cache (kv_cache_scheme {short(scheme)}).", OTHERWISE)
    sparsity = quantization.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format") not in (None, "dense")):
        raise Unsupported(f"{where} stores sparse weights (sparsity_config {short(sparsity)}).", OTHERWISE)
    if transforms := quantization.get("transform_config"):
        raise Unsupported(f"{where} rotates activations (transform_config {short(transforms)}).", OTHERWISE)
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise QALoraError(f"{where}: config_groups is {short(groups)}, expected groups. Copy config.json again.")
    found = [_scheme(name, group, quantization.get("format"), where) for name, group in groups.items()]
    return list(dict.fromkeys(found))


def _scheme(name: str, group: Any, stated: Any, where: object) -> Scheme:
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        raise QALoraError(
            f"{where}: config_groups.{name} is {short(group)}, expected its weights. Copy config.json again."
        )
    what = f"{where}: config_groups.{name}"
    layout = group.get("format") or stated
    if layout != PACKED:
        raise Unsupported(f"{what} is stored as {short(layout)}, expected {PACKED!r}.", OTHERWISE)
    for part in ("input_activations", "output_activations"):
        if group.get(part):
            raise Unsupported(f"{what} quantizes {part.replace('_', ' ')}; weights alone can be imported.", OTHERWISE)
    bits, kind, size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
    if kind != "int" or type(bits) is not int or bits not in SUPPORTED_BITS:
        raise Unsupported(
            f"{what} has {short(kind)} weights of {short(bits)} bits, expected int of 2, 3, 4 or 8.", OTHERWISE
        )
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    whole = type(size) is int and size > 0
    if strategy not in ("channel", "group") or (strategy == "group" and not whole):
        raise Unsupported(
            f"{what} has strategy {short(strategy)} with group_size {short(size)}, expected groups or channels.",
            OTHERWISE,
        )
    return Scheme(bits, size if strategy == "group" else None, bool(weights.get("symmetric", True)))
