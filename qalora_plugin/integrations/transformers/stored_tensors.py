"""A packed linear while transformers fills it, and when it saves it: its tensors are then those on disk.

transformers loads and saves by names. So a new layer starts with the checkpoint's tensors as its buffers, on the meta
device; once they are loaded, the format makes a weight of them, and when the model is saved, these of it again.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.base import CheckpointFormat, Headers
from qalora_plugin.formats.qalora import FACTORS, SCALES
from qalora_plugin.layers.linear import QuantLinear

_WEIGHT = (
    "qweight",
    "zeros",
    "scales",
    "scales_delta",
    "offsets",
    "offsets_a",
    "offsets_b",
    "g_idx",
)  # buffers of a QuantLinear that a format stores


def expect_stored(layer: QuantLinear, spec: GroupwiseSpec, fmt: CheckpointFormat, tensors: Headers) -> None:
    """Give ``layer`` buffers without memory for every tensor that the checkpoint stores of it."""
    for part in fmt.parts(spec):
        info = tensors[f"{spec.name}.{part}"]
        layer.register_buffer(part, torch.empty(info.shape, dtype=getattr(torch, info.torch_dtype), device="meta"))


def adopt_stored(layer: QuantLinear, spec: GroupwiseSpec, fmt: CheckpointFormat, load: Callable[[str], Tensor]) -> None:
    """Make the weight of the loaded buffers.

    Args:
        load: reads a tensor from disk. Where a rank leaves weights to another one that will send them, its buffers are
            on the meta device; but whether columns are in order is a question of ``g_idx``'s values.
    """
    stored = {f"{spec.name}.{part}": layer.get_buffer(part) for part in fmt.parts(spec)}
    if layer.qweight.is_meta and spec.has_g_idx:
        stored[f"{spec.name}.g_idx"] = load(f"{spec.name}.g_idx")
    bias = stored.get(f"{spec.name}.bias")
    whole = replace(spec, offset_dtype=None, offset_rank=0) if spec.offset_rank else spec  # but for what stays factors
    weight = fmt.read(whole, stored.__getitem__)
    for part in fmt.parts(spec):
        if part not in (*_WEIGHT, "bias"):
            delattr(layer, part)
    layer.set_weight(weight, bias)
    if spec.scales_delta_dtype:
        layer.scales, layer.scales_delta = (stored[f"{spec.name}.{part}"] for part in SCALES)
    if spec.offset_rank:
        layer.offsets_a, layer.offsets_b = (stored[f"{spec.name}.{part}"] for part in FACTORS)


def as_stored(layer: QuantLinear, name: str, spec: GroupwiseSpec, fmt: CheckpointFormat) -> dict[str, Tensor]:
    """The tensors of ``layer``, called ``name``, as they were loaded."""
    held = layer.named_tensors()
    bias = {} if held["bias"] is None else {f"{name}.bias": held["bias"]}
    kept = (*(SCALES if spec.scales_delta_dtype else ()), *(FACTORS if spec.offset_rank else ()))
    weight = layer.quantized
    if spec.offset_rank:
        weight = weight._replace(offsets=None)
    stored = {f"{name}.{part}": tensor for part in kept if (tensor := held[part]) is not None}
    return fmt.write(name, weight, g_idx=spec.has_g_idx) | bias | stored
