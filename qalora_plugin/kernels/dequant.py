"""Packed weight → dense weight in a shared scratch buffer, with the offsets added on the way.

Works one *plane* at a time (rows ``j::period``, one code of every word), so the temporaries are 1/period of the dense
weight. Arithmetic is float32 (float64 on request) and rounds once to the output dtype.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..quant.layout import code_plane, codes_per_period, read_zeros

if TYPE_CHECKING:
    from ..quant.linear import QuantLinear

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def scratch(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A ``[rows, cols]`` view of the one scratch buffer per device and dtype; its content lasts until the next call."""
    key, size = (device, dtype), rows * cols
    if key not in _scratch or _scratch[key].numel() < size:
        with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
            _scratch[key] = torch.empty(size, dtype=dtype, device=device)
    return _scratch[key][:size].view(rows, cols)


@torch.no_grad()
def dequantize(layer: "QuantLinear", dtype: torch.dtype, offsets: Tensor | None = None) -> Tensor:
    """Dense weight ``[K, N]`` of ``layer`` in ``dtype``, in the shared scratch: use it before the next call.

    Args:
        layer: holds the packed tensors; its own ``offsets`` are *not* added.
        offsets: ``[G, N]`` in weight units, or None.
    """
    bits, group_size = layer.bits, layer.group_size
    math_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = scratch(layer.in_features, layer.out_features, dtype, layer.qweight.device)
    scales = layer.scales.to(math_dtype)
    zeros = read_zeros(layer.qzeros, bits, layer.checkpoint_format).to(math_dtype)
    offsets = None if offsets is None else offsets.to(math_dtype)
    period = codes_per_period(bits)
    aligned = not layer.act_order and group_size % period == 0

    for j in range(period):
        codes, rows = code_plane(layer.qweight, bits, j), out[j::period]
        if aligned:  # a plane holds group_size/period consecutive rows of every group: broadcast
            codes, rows = (t.view(layer.groups, group_size // period, -1) for t in (codes, rows))
            s, z, o = (None if t is None else t.unsqueeze(1) for t in (scales, zeros, offsets))
        else:
            group = layer.g_idx[j::period].long()
            s, z, o = (None if t is None else t[group] for t in (scales, zeros, offsets))
        centred = codes - z
        if o is None:
            torch.mul(centred, s, out=rows)
        else:
            rows.copy_(centred.mul_(s).add_(o))
    return out
