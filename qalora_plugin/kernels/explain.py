"""Which kernels a linear trains on, in words, by the same questions that choose them."""

from typing import NamedTuple

import torch

from ..quant.words import codes_per_period, words_per_period
from . import cpu
from .dequant import gemm_dtype, runs_triton
from .packed import PackedWeight


class Choice(NamedTuple):
    """A way to compute, and why it is not a faster one (None if there is none)."""

    kernel: str
    why_not_faster: str | None


def training_kernel(packed: PackedWeight, dtype: torch.dtype) -> Choice:
    """How ``kernels.linear`` multiplies by this weight for activations of ``dtype``, on the device it is on."""
    if runs_triton(torch.empty(0, dtype=dtype, device=packed.qweight.device)):
        return Choice("Triton unpacks, cuBLAS multiplies; few tokens in one Triton kernel", None)
    slower = cpu.why_not_multiply(packed, dtype)
    if slower is None:
        return Choice("C++ multiplies by the packed weight (AVX512-BF16)", None)
    gemm = gemm_dtype(dtype, packed.qweight.device)
    emulated = f" {dtype} is only emulated here." if gemm != dtype else ""
    if plain := cpu.why_not(packed, gemm):
        return Choice(f"plain torch unpacks, then a GEMM in {gemm}", f"{plain}.{emulated}")
    return Choice(f"C++ unpacks, then torch's GEMM in {gemm}", f"{slower}.{emulated}")


def example_weight(
    in_features: int, out_features: int, bits: int, group_size: int, act_order: bool, device: str
) -> PackedWeight:
    """A packed weight of this kind with nothing in it, to ask about."""
    period, words = codes_per_period(bits), words_per_period(bits)
    group_size = in_features if group_size == -1 else group_size
    groups = in_features // group_size
    return PackedWeight(
        qweight=torch.empty(in_features // period * words, out_features, dtype=torch.int32, device=device),
        qzeros=torch.empty(groups, out_features // period * words, dtype=torch.int32, device=device),
        scales=torch.empty(groups, out_features, dtype=torch.float16, device=device),
        offsets=None,
        g_idx=torch.empty(in_features, dtype=torch.int32, device=device) if act_order else None,
        group_order=None,
        bits=bits,
        group_size=group_size,
        checkpoint_format="gptq",
    )
