"""The definition, in plain torch. Everything else (kernels, merge, vLLM, exporters) is tested against this file.

Letters: ``T`` tokens, ``K`` in_features, ``N`` out_features, ``g`` group size, ``G = K/g`` groups, ``R`` rank,
``b`` bits.
"""

import torch
from torch import Tensor

from qalora_plugin.core.packing import unpack_rows
from qalora_plugin.core.weight import GroupwiseWeight


def dequantize(weight: GroupwiseWeight, dtype: torch.dtype = torch.float64) -> Tensor:
    """``w[k,n] = scales[γ,n]·(q[k,n] − zeros[γ,n]) + offsets[γ,n]`` with γ the group of column k → ``[K, N]``."""
    group = column_groups(weight)
    dense = weight.scales.to(dtype)[group] * unit_steps(weight, dtype)
    return dense if weight.offsets is None else dense + weight.offsets.to(dtype)[group]


def unit_steps(weight: GroupwiseWeight, dtype: torch.dtype = torch.float64) -> Tensor:
    """``q − zeros`` ``[K, N]``: what scales multiply."""
    return unpack_rows(weight.qweight, weight.bits).to(dtype) - weight.zeros.to(dtype)[column_groups(weight)]


def column_groups(weight: GroupwiseWeight) -> Tensor:
    """The group of every column, int64 ``[K]``."""
    if weight.g_idx is not None:
        return weight.g_idx.long()
    return torch.arange(weight.in_features, device=weight.qweight.device) // weight.group_size


def pool(x: Tensor, g_idx: Tensor, groups: int) -> Tensor:
    """``P(x)``: x summed over each group, ``[..., K] → [..., G]`` (QA-LoRA, arXiv 2309.14717, eq. 4)."""
    out = torch.zeros(*x.shape[:-1], groups, dtype=x.dtype, device=x.device)
    return out.index_add(-1, g_idx.long(), x)


def adapter_offsets(
    lora_a: Tensor, lora_b: Tensor, scaling: float, unit: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """What merging adds: ``α/R · (B·A)ᵀ``, A ``[R, G]``, B ``[N, R]`` → ``[G, N]`` in weight units.

    Args:
        unit: the scales ``[G, N]``, of adapters that train them too.
    """
    lora_b = lora_b.t().contiguous()  # or BLAS takes five times as long
    offsets = (scaling * lora_a.to(dtype)).t() @ lora_b.to(dtype)
    return offsets if unit is None else offsets * unit.to(dtype)


def factored_offsets(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Offsets that are stored as factors: ``a·b``, a ``[G, r]``, b ``[r, N]`` → ``[G, N]`` in weight units."""
    return a.to(dtype) @ b.to(dtype)


def adapter_scales(scales: Tensor, d: Tensor, c: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """What merging adds to the scales ``[G, N]``: ``scales ⊙ D·C``, D ``[G, R]``, C ``[R, N]``."""
    return scales.to(dtype) * (d.to(dtype) @ c.to(dtype))


def scaled_weight(weight: GroupwiseWeight, d: Tensor, c: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``s⊙(1 + D·C)·(q − z) + offsets`` ``[K, N]``, differentiable in D and C."""
    group = column_groups(weight)
    scales = weight.scales.to(dtype) + adapter_scales(weight.scales, d, c, dtype)
    dense = scales[group] * unit_steps(weight, dtype)
    return dense if weight.offsets is None else dense + weight.offsets.to(dtype)[group]


def adapter_linear(
    x: Tensor, weight: Tensor, g_idx: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """``y = x·w + α/R · P(x)·Aᵀ·Bᵀ (+ bias)``, x ``[..., K]``, weight ``[K, N]`` → ``[..., N]``."""
    y = x @ weight + scaling * (pool(x, g_idx, lora_a.shape[1]) @ lora_a.t() @ lora_b.t())
    return y if bias is None else y + bias
