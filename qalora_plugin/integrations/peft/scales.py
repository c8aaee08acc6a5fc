"""Trained step sizes of an adapter: D and C of :class:`~qalora_plugin.core.delta.ScaleDelta`, as PEFT holds them.

With them all four factors change the weight in units of its steps. A and B then learn three times as fast as a LoRA
would, D and C ``scales_lr_ratio`` times, so that a LoRA's rate is right. Parameter groups would have to be made for
every optimizer of every trainer; instead what PEFT holds is each factor divided by its ratio, and its gradient is the
factor's. So a step of A is ``ratio`` times as large as the optimizer's, while clipping and the optimizer see the
gradients that parameter groups would show them. It is the same for every optimizer whose step depends on gradients
alone. One that looks at the parameters themselves differs: weight decay takes the share per step that it takes of any
parameter, not ``ratio`` times that share; Adafactor's ``scale_parameter`` undoes the ratio.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qalora_plugin.checkpoint.adapter_config import Ratios
from qalora_plugin.core.delta import ScaleDelta
from qalora_plugin.layers.sharding import StackedFactors, factor

GRADIENT_EVERY = 4  # tokens


class _Stretched(torch.autograd.Function):
    """``ratio·parameter``, whose gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, ratio: float) -> Tensor:
        return parameter * ratio

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def stretched(linear: nn.Linear | StackedFactors, ratio: float) -> Tensor:
    """A factor of an adapter from the layer that holds it, divided by its ratio."""
    found = factor(linear)
    return found if ratio == 1 else _Stretched.apply(found, ratio)


def new_factors(groups: int, out_features: int, rank: int, init: bool | str) -> tuple[nn.Linear, nn.Linear]:
    """Layers whose weights are D ``[G, R]``, as A is initialised, and C ``[R, N]``, zero."""
    d, c = nn.Linear(rank, groups, bias=False), nn.Linear(out_features, rank, bias=False)
    with torch.no_grad():
        if init == "gaussian":
            nn.init.normal_(d.weight, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(d.weight, a=math.sqrt(5), mode="fan_out")  # by G, what A's is initialised by
        if init:
            nn.init.zeros_(c.weight)
    return d, c


def scale_delta(
    lora_d: Any, lora_c: Any, ratios: Mapping[str, Ratios], strengths: Mapping[str, float], training: bool
) -> ScaleDelta | None:
    """What adapters make of the scales together: ``Σ strength·D·C``, as one product; None for nothing.

    Args:
        strengths: of every active adapter with scales; 1: as it was trained. training: the layer is, not evaluated.
    """
    if not strengths:
        return None
    d = [_times(stretched(lora_d[name], ratios[name].scales), strength) for name, strength in strengths.items()]
    c = [stretched(lora_c[name], ratios[name].scales) for name in strengths]
    # By what is held: made of it, and not recorded, nothing requires a gradient.
    learns = training and any(lora[name].weight.requires_grad for name in strengths for lora in (lora_d, lora_c))
    factors = (d[0], c[0]) if len(d) == 1 else (torch.cat(d, -1), torch.cat(c, -2))
    return ScaleDelta(*factors, GRADIENT_EVERY if learns else 1)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor
