"""A trial of the accuracy table: offsets in units of scales, ``w' = s⊙[(1 + D·C)·(q − z) + B·A]``, in plain torch."""

import math

import torch
from torch import Tensor, nn

from qalora_plugin.core import reference
from qalora_plugin.layers.linear import QuantLinear


class InScaleUnits(nn.Module):
    """A linear over a packed one: A ``[R, G]``, B ``[N, R]``, D ``[G, R]``, C ``[R, N]``; B and C begin at zero."""

    def __init__(self, layer: QuantLinear, rank: int):
        super().__init__()
        weight = layer.quantized
        self.register_buffer("group", reference.column_groups(weight), persistent=False)
        self.register_buffer("steps", reference.unit_steps(weight, torch.bfloat16), persistent=False)  # [K, N], exact
        self.register_buffer("scales", weight.scales.float(), persistent=False)
        groups, out_features = weight.scales.shape
        bound = 1 / math.sqrt(groups)
        new = {"device": weight.scales.device, "dtype": torch.float32}
        self.a = nn.Parameter(torch.empty(rank, groups, **new).uniform_(-bound, bound))
        self.d = nn.Parameter(torch.empty(groups, rank, **new).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(out_features, rank, **new))
        self.c = nn.Parameter(torch.zeros(rank, out_features, **new))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scales = self.scales * (1 + self.d @ self.c)
            offsets = self.scales * (self.b @ self.a).t()
            weight = scales[self.group] * self.steps + offsets[self.group]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return x.to(dtype) @ weight.to(dtype)
