"""Which kernel multiplies by a weight: the first that does not say why not. One log line says which, as in vLLM."""

import logging
from typing import NamedTuple

import torch

from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.core.words import codes_per_period, words_per_period
from qalora_plugin.kernels import cpu
from qalora_plugin.kernels.base import Kernel
from qalora_plugin.kernels.cpu.kernel import CompiledCpu
from qalora_plugin.kernels.hardware import gemm_dtype, runs_triton
from qalora_plugin.kernels.triton.kernel import FewTokens
from qalora_plugin.kernels.unpacking import UnpackAndMultiply

logger = logging.getLogger(__name__)

KERNELS: tuple[Kernel, ...] = (CompiledCpu(), FewTokens(), UnpackAndMultiply())  # the last takes everything


_said: set[tuple[Kernel, int, int, torch.dtype]] = set()


class Choice(NamedTuple):
    """A way to compute, and why it is not a faster one (None if there is none)."""

    kernel: str
    why_not_faster: str | None


def choose(weight: GroupwiseWeight, dtype: torch.dtype, tokens: int | None = None) -> Kernel:
    """The kernel for activations of ``dtype``.

    Args:
        tokens: how many there are; None: some thousands, and for a backward pass.
    """
    for kernel in KERNELS:
        if kernel.why_not(weight, dtype, tokens) is None:
            kind = (kernel, weight.bits, weight.group_size, dtype)
            if tokens is None and kind not in _said:
                _said.add(kind)
                how = kernel.describe(weight, dtype)
                logger.info("%d-bit weights, groups of %d, %s: %s", weight.bits, weight.group_size, dtype, how)
            return kernel
    raise AssertionError("the last kernel takes everything")


def training_kernel(weight: GroupwiseWeight, dtype: torch.dtype) -> Choice:
    """How linears train on this weight with activations of ``dtype``, on the device it is on."""
    kernel, device = choose(weight, dtype), weight.qweight.device
    how = kernel.describe(weight, dtype)
    if kernel is not KERNELS[-1] or runs_triton(torch.empty(0, dtype=dtype, device=device)):
        return Choice(how, None)
    gemm = gemm_dtype(dtype, device)
    emulated = f". {dtype} is only emulated here." if gemm != dtype else ""
    why_not = cpu.why_not_fill(weight, gemm) or cpu.why_not_multiply(weight, dtype)
    return Choice(how, f"{why_not}{emulated}")


def example_weight(spec: GroupwiseSpec, act_order: bool, device: str) -> GroupwiseWeight:
    """A packed weight of this kind with nothing in it, to ask about."""
    period, words = codes_per_period(spec.bits), words_per_period(spec.bits)
    groups, n = spec.groups, spec.out_features
    return GroupwiseWeight(
        qweight=torch.empty(spec.in_features // period * words, n, dtype=torch.int32, device=device),
        zeros=torch.empty(groups, n, dtype=torch.uint8, device=device),
        scales=torch.empty(groups, n, dtype=torch.float16, device=device),
        offsets=None,
        g_idx=torch.empty(spec.in_features, dtype=torch.int32, device=device) if act_order else None,
        group_order=None,
        bits=spec.bits,
        group_size=spec.group_size,
    )
