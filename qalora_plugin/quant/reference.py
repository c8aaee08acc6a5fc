"""The definition, in plain torch. Everything else (kernels, merge, vLLM, exporters) is tested against this file.

Letters: ``T`` tokens, ``K`` in_features, ``N`` out_features, ``g`` group size, ``G = K/g`` groups, ``R`` rank,
``b`` bits.
"""

import torch
from torch import Tensor

from .layout import read_zeros, unpack_rows


def dequantize(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bits: int,
    checkpoint_format: str,
    offsets: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``w[k,n] = scales[γ,n]·(q[k,n] − zeros[γ,n]) + offsets[γ,n]`` with ``γ = g_idx[k]`` → ``[K, N]``.

    Args:
        qweight: int32 ``[K·b/32, N]``. qzeros: int32 ``[G, N·b/32]``. scales: ``[G, N]``. g_idx: int ``[K]``.
        offsets: ``[G, N]`` in weight units, or None.
    """
    group = g_idx.long()
    codes = unpack_rows(qweight, bits).to(dtype)
    zeros = read_zeros(qzeros, bits, checkpoint_format).to(dtype)
    weight = scales.to(dtype)[group] * (codes - zeros[group])
    return weight if offsets is None else weight + offsets.to(dtype)[group]


def pool(x: Tensor, g_idx: Tensor, groups: int) -> Tensor:
    """``P(x)``: x summed over each group, ``[..., K] → [..., G]`` (QA-LoRA, arXiv 2309.14717, eq. 4)."""
    out = torch.zeros(*x.shape[:-1], groups, dtype=x.dtype, device=x.device)
    return out.index_add(-1, g_idx.long(), x)


def adapter_offsets(lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """What merging adds: ``α/R · (B·A)ᵀ``, A ``[R, G]``, B ``[N, R]`` → ``[G, N]`` in weight units."""
    lora_b = lora_b.t().contiguous()  # or BLAS takes five times as long
    return (scaling * lora_a.to(dtype)).t() @ lora_b.to(dtype)


def adapter_linear(
    x: Tensor, weight: Tensor, g_idx: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """``y = x·w + α/R · P(x)·Aᵀ·Bᵀ (+ bias)``, x ``[..., K]``, weight ``[K, N]`` → ``[..., N]``."""
    y = x @ weight + scaling * (pool(x, g_idx, lora_a.shape[1]) @ lora_a.t() @ lora_b.t())
    return y if bias is None else y + bias
