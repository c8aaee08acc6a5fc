"""Whether a 16-bit model is the one that a base was quantized from: only then can linears be brought nearer to it."""

from math import inf
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.reference import dequantize
from qalora_plugin.core.weight import GroupwiseWeight

_ROUNDED = 0.02  # relative: of norms, which no quantization changes, more than any rounding to 16 bits
_UNRELATED = 1.5  # squared error of one linear's weights over their square, from which they are not the same ones


def require_same_sizes(twin: nn.Module, weights: dict[str, GroupwiseWeight], dense: str | Path) -> None:
    """Refuse a model without linears of these names and sizes."""
    modules = dict(twin.named_modules())
    for name, weight in weights.items():
        stored = getattr(modules.get(name), "weight", None)
        expected = (weight.in_features, weight.out_features)
        found = None if stored is None or stored.dim() != 2 else tuple(dense_weight(modules[name]).shape)
        if found != expected:
            what = "has no such linear" if found is None else f"has one of {found[0]}×{found[1]}"
            raise QALoraError(
                f"{dense} is not the 16-bit model of this base: {name} is {expected[0]}×{expected[1]} here, and "
                f"{dense} {what}. Give the model that the base was quantized from."
            )


def require_near(twin: nn.Module, weights: dict[str, GroupwiseWeight], dense: str | Path) -> None:
    """Refuse a model of the same sizes with other weights: what quantization leaves is nearer to them than zero is, by
    and large; weights that have nothing to do with each other are off by √2 of their size.
    """
    off, all_of_it = 0.0, 0.0

    def refuse(what: str, off: float, all_of_it: float) -> None:
        raise QALoraError(
            f"{dense} is not the 16-bit model of this base: {what} off by "
            f"{(off / all_of_it) ** 0.5 if all_of_it else inf:.0%} of their size. Give the model that the base was "
            "quantized from."
        )

    for name, weight in weights.items():
        wanted = dense_weight(twin.get_submodule(name)).to(weight.scales.device, torch.float32)
        if not wanted.isfinite().all():
            raise QALoraError(f"{dense} holds NaN or Inf, in {name}. Download or copy it again.")
        error, size = (wanted - dequantize(weight, torch.float32)).square().sum().item(), wanted.square().sum().item()
        if error > _UNRELATED * size:
            refuse(f"the weights of {name} are", error, size)
        off, all_of_it = off + error, all_of_it + size
    if not off < all_of_it:
        refuse("the weights that both have are", off, all_of_it)


def require_same_norms(twin: nn.Module, base: nn.Module, dense: str | Path) -> None:
    """Refuse a base in which scales were moved between layers, as AWQ and SmoothQuant do: the model computes the same,
    and a linear of it does not.
    """
    theirs = {name: tensor for name, tensor in twin.named_parameters() if tensor.dim() == 1}
    for name, tensor in base.named_parameters():
        if name in theirs and tensor.shape == theirs[name].shape:
            found, wanted = (one.detach().to("cpu", torch.float32) for one in (tensor, theirs[name]))
            if not (found - wanted).norm() <= _ROUNDED * wanted.norm():
                raise QALoraError(
                    f"{name} is another one in this base than in {dense}. Give the model that the base was quantized "
                    "from, if it is not that; if it is, scales were moved between its layers (AWQ does that), and "
                    "init: calibrated is not for this base."
                )


def dense_weight(linear: nn.Module) -> Tensor:
    """``[K, N]`` of a linear, or of what transformers calls Conv1D, which stores it so."""
    weight = cast(Tensor, linear.weight).detach()
    return weight.t() if isinstance(linear, nn.Linear) else weight
