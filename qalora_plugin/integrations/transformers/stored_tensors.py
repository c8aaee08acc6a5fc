"""A packed linear while transformers fills it, and when it saves it: its tensors are then those on disk.

transformers loads and saves by names. So a new layer starts with the checkpoint's tensors as its buffers, on the meta
device; once they are loaded, the format makes a weight of them; in a ``state_dict`` they have names as on disk again.
"""

from functools import partial

import torch
from torch import Tensor

from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.base import CheckpointFormat, Headers
from qalora_plugin.formats.qalora import SCALES
from qalora_plugin.layers.linear import QuantLinear

_WEIGHT = (
    "qweight",
    "zeros",
    "scales",
    "scales_delta",
    "offsets",
    "g_idx",
)  # buffers of a QuantLinear that a format stores


def expect_stored(layer: QuantLinear, spec: GroupwiseSpec, fmt: CheckpointFormat, tensors: Headers) -> None:
    """Give ``layer`` buffers without memory for every tensor that the checkpoint stores of it."""
    for part in fmt.parts(spec):
        info = tensors[f"{spec.name}.{part}"]
        layer.register_buffer(part, torch.empty(info.shape, dtype=getattr(torch, info.torch_dtype), device="meta"))


def adopt_stored(layer: QuantLinear, spec: GroupwiseSpec, fmt: CheckpointFormat) -> None:
    """Make the weight of the loaded buffers, and have ``state_dict`` give them back as they were stored."""
    stored = {f"{spec.name}.{part}": layer.get_buffer(part) for part in fmt.parts(spec)}
    bias = stored.get(f"{spec.name}.bias")
    weight = fmt.read(spec, stored.__getitem__)
    for part in fmt.parts(spec):
        if part not in (*_WEIGHT, "bias"):
            delattr(layer, part)
    layer.set_weight(weight, bias)
    if spec.scales_delta_dtype:
        layer.scales, layer.scales_delta = (stored[f"{spec.name}.{part}"] for part in SCALES)

    layer.register_state_dict_post_hook(partial(_as_stored, spec=spec, fmt=fmt))


def _as_stored(
    layer: QuantLinear, state: dict[str, Tensor], prefix: str, _: dict, spec: GroupwiseSpec, fmt: CheckpointFormat
) -> None:
    for part in _WEIGHT:
        state.pop(f"{prefix}{part}", None)
    scales = {f"{prefix}{part}": getattr(layer, part) for part in SCALES} if spec.scales_delta_dtype else {}
    state.update(fmt.write(prefix.removesuffix("."), layer.quantized, g_idx=spec.has_g_idx) | scales)
