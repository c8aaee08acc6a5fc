"""A packed linear while transformers fills it, and when it saves it: its tensors are then those on disk.

transformers loads and saves by names. So a new layer starts with the checkpoint's tensors as its buffers, on the meta
device; once they are loaded, the format makes a weight of them; in a ``state_dict`` they have names as on disk again.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.base import CheckpointFormat, Headers
from qalora_plugin.layers.linear import QuantLinear

_WEIGHT = ("qweight", "zeros", "scales", "offsets", "g_idx")  # buffers of a QuantLinear that a format stores


def expect_stored(layer: QuantLinear, spec: GroupwiseSpec, fmt: CheckpointFormat, tensors: Headers) -> None:
    """Give ``layer`` buffers without memory for every tensor that the checkpoint stores of it."""
    for part in fmt.parts(spec):
        info = tensors[f"{spec.name}.{part}"]
        layer.register_buffer(part, torch.empty(info.shape, dtype=getattr(torch, info.torch_dtype), device="meta"))


def adopt_stored(layer: QuantLinear, spec: GroupwiseSpec, fmt: CheckpointFormat, load: Callable[[str], Tensor]) -> None:
    """Make the weight of the loaded buffers, and have ``state_dict`` give them back as they were stored.

    Args:
        load: reads a tensor from disk. Where a rank leaves weights to another one that will send them, its buffers are
            on the meta device; but whether columns are in order is a question of ``g_idx``'s values.
    """
    stored = {f"{spec.name}.{part}": layer.get_buffer(part) for part in fmt.parts(spec)}
    if layer.qweight.is_meta and spec.has_g_idx:
        stored[f"{spec.name}.g_idx"] = load(f"{spec.name}.g_idx")
    bias = stored.get(f"{spec.name}.bias")
    weight = fmt.read(spec, stored.__getitem__)
    for part in fmt.parts(spec):
        if part not in (*_WEIGHT, "bias"):
            delattr(layer, part)
    layer.set_weight(weight, bias)

    layer.register_state_dict_post_hook(partial(_as_stored, spec=spec, fmt=fmt))


def _as_stored(
    layer: QuantLinear, state: dict[str, Tensor], prefix: str, _: dict, spec: GroupwiseSpec, fmt: CheckpointFormat
) -> None:
    if layer.words is not None:
        return  # what shards a model loads what it saved
    for part in _WEIGHT:
        state.pop(f"{prefix}{part}", None)
    state.update(fmt.write(prefix.removesuffix("."), layer.quantized, g_idx=spec.has_g_idx))
