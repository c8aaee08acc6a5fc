"""Dequantisation in plain torch: any device, bit width, dtype and act-order.

Works one *plane* at a time (rows ``j::period``, one code of every word), so the temporaries are 1/period of the dense
weight. Arithmetic is float32 (float64 on request) and rounds once to the output dtype.
"""

import torch
from torch import Tensor

from qalora_plugin.core.packing import code_plane
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.core.words import codes_per_period


def fill(weight: GroupwiseWeight, offsets: Tensor | None, out: Tensor) -> None:
    """Write the dense weight, plus ``offsets`` [G, N] instead of the packed ones, to ``out`` ``[K, N]``."""
    bits, group_size, groups = weight.bits, weight.group_size, weight.groups
    math_dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    scales, zeros = weight.scales.to(math_dtype), weight.zeros.to(math_dtype)
    offsets = None if offsets is None else offsets.to(math_dtype)
    period = codes_per_period(bits)
    aligned = weight.g_idx is None and group_size % period == 0

    for j in range(period):
        codes, rows = code_plane(weight.qweight, bits, j), out[j::period]
        if aligned:  # a plane holds group_size/period consecutive rows of every group: broadcast
            codes, rows = (t.view(groups, group_size // period, -1) for t in (codes, rows))
            s, z = scales.unsqueeze(1), zeros.unsqueeze(1)
            o = None if offsets is None else offsets.unsqueeze(1)
        else:
            columns = torch.arange(j, weight.in_features, period, device=out.device)
            group = columns // group_size if weight.g_idx is None else weight.g_idx[columns].long()
            s, z = scales[group], zeros[group]
            o = None if offsets is None else offsets[group]
        centred = codes - z
        if o is None:
            torch.mul(centred, s, out=rows)
        else:
            rows.copy_(centred.mul_(s).add_(o))
