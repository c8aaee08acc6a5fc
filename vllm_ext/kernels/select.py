"""Which way a layer is computed, and why.

    fused-zeros       offsets inside the kernel's float zero-points, no second term (Machete on Hopper, torch on a CPU)
    kernel+offsets    vLLM's kernel for this machine, then ``ops.add_offsets`` in place
    dense             plain torch, weights unpacked at every call: correct everywhere, slow

Without a word from the user the first that is possible runs. One exception: Machete on a symmetric base in bfloat16,
where ``−8·scales + offsets`` would be rounded to bfloat16 once and lose about a tenth of the contribution of an adapter
that shifts by a tenth of a step (a hundredth in float16), while without offsets nothing is rounded. (The zeros of an
asymmetric 4-bit base Machete rounds anyway.) There, and with 8 bits in bfloat16, fused-zeros has to be forced.
On a CPU with AMX vLLM's kernel quantizes activations to INT8, token by token, which moves log-probabilities three times
as far as bfloat16 does: an adapted layer takes it there if that is forced, or if nothing else is possible; a layer that
no adapter changed does as in vLLM alone. Where VLLM_CPU_INT4_W4A8=0 has it compute in bfloat16, it may be the faster
one: ``amx`` times both, and the config has the result.
The environment's ``QALORA_PATH``, or ``serving_path`` in ``quantization_config``, forces a path for every layer.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.platforms import current_platform

from qalora_plugin.core.errors import QALoraError
from vllm_ext.kernels import amx
from vllm_ext.kernels.cpu_int4 import GROUP_SIZES, Int4PackKernel
from vllm_ext.kernels.vllm import FloatZeroKernel, NoKernel, find_float_zero_kernel, find_kernel

Kernel: TypeAlias = MPLinearKernel | Int4PackKernel
logger = init_logger("vllm.qalora")  # below "vllm", whose handlers show it

FUSED, SEPARATE, DENSE = PATHS = ("fused-zeros", "kernel+offsets", "dense")
PATH_VARIABLE, PATH_KEY = "QALORA_PATH", "serving_path"
TIMED_KEY = "timed_path"  # what was faster here, in the same place


@dataclass(frozen=True)
class LayerKind:
    """What decides the path of a layer.

    Attributes:
        prefix: the layer's name, for messages.
        group_size: −1 for one group over all of K.
        full_shape: ``(K, N)`` of the whole layer. shape: of this rank's share.
        has_offsets: False for a layer that no adapter changed: every path but dense is the kernel alone.
        sortable: False if fused parts differ in their act-order, so that no one order of x suits a kernel.
    """

    prefix: str
    bits: int
    symmetric: bool
    group_size: int
    act_dtype: torch.dtype
    full_shape: tuple[int, int]
    shape: tuple[int, int]
    has_offsets: bool
    sortable: bool

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        adapted = "" if self.has_offsets else ", not adapted"
        return f"{self.bits}-bit {kind} weights, group size {self.group_size}, {self.act_dtype}{adapted}"


def forced_path(quantization: dict) -> str | None:
    """The path that the environment or the checkpoint's config asks for.

    Raises:
        QALoraError: there is no such path.
    """
    path = os.environ.get(PATH_VARIABLE) or quantization.get(PATH_KEY)
    if path and path not in PATHS:
        raise QALoraError(
            f"the serving path ({PATH_VARIABLE}, or {PATH_KEY} in quantization_config) is {path!r}, expected one of "
            f"{', '.join(PATHS)}, or nothing to let qalora choose."
        )
    return path or None


def timed_path(quantization: dict, code: str) -> str | None:
    """Which of both paths was faster on this CPU, where that is not known beforehand and both compute the same: with
    AMX, and activations that vLLM leaves as they are."""
    group_size = quantization.get("group_size")
    if current_platform.is_cpu() and amx.has_amx() and not _quantizes_activations() and group_size in GROUP_SIZES:
        with suppress(NoKernel):
            return amx.faster_path(group_size, code)
    return None


def _quantizes_activations() -> bool:
    """Whether vLLM's kernel multiplies in INT8 here."""
    return current_platform.is_cpu() and amx.has_amx() and getattr(envs, "VLLM_CPU_INT4_W4A8", False)


def choose_path(kind: LayerKind, forced: str | None, timed: str | None = None) -> tuple[str, Kernel | None]:
    """The path of a layer and the kernel that it needs; logged once for each kind of layer.

    Args:
        timed: from :func:`timed_path`.

    Raises:
        QALoraError: the forced path is impossible, or no kernel takes the dtype and dense was not asked for.
    """
    path, kernel, why = _choose(kind, forced, timed)
    if path != DENSE:
        name = path if kind.has_offsets else "kernel"
        if path == SEPARATE and kind.act_dtype == torch.bfloat16 and _quantizes_activations():
            why += "; it multiplies in INT8, which VLLM_CPU_INT4_W4A8=0 avoids"
        logger.info_once("qalora: %s (%s) for %s: %s", name, _name(kernel), str(kind), why)
    elif forced:
        logger.info_once("qalora: dense for %s: %s", str(kind), why)
    else:
        logger.warning_once("qalora: dense (plain torch, SLOW) for %s: %s", str(kind), why)
    return path, kernel


def explain(
    bits: int,
    symmetric: bool,
    group_size: int,
    act_order: bool,
    act_dtype: torch.dtype,
    shape: tuple[int, int],
    quantization: dict[str, Any],
) -> tuple[str, str | None]:
    """For an adapted layer on one rank: its path and kernel, and why not a faster one (None if it is the first).

    Args:
        quantization: the checkpoint's ``quantization_config``, which may force a path.
    """
    kind = LayerKind("a layer", bits, symmetric, group_size, act_dtype, shape, shape, has_offsets=True, sortable=True)
    try:
        path, kernel, why = _choose(kind, forced_path(quantization), None)
    except QALoraError as error:
        return "refused", str(error)
    name = path if kernel is None else f"{path} ({_name(kernel)})"
    reasons = [] if path == FUSED else [why]
    reasons += ["act-order reorders x first, and forbids tensor parallelism"] if act_order else []
    return name, "; ".join(reasons) or None


def _choose(kind: LayerKind, forced: str | None, timed: str | None) -> tuple[str, Kernel | None, str]:
    if forced == DENSE:
        return DENSE, None, "forced"
    why_not, slower = "", None
    if kind.has_offsets and forced in (None, FUSED):
        try:
            kernel = _find_fused(kind)
        except NoKernel as reason:
            if forced:
                raise _impossible(kind, forced, reason) from reason
            why_not = str(reason)
        else:
            if forced:
                return FUSED, kernel, "forced"
            rounds = isinstance(kernel, FloatZeroKernel) and kind.act_dtype == torch.bfloat16
            if rounds and (kind.symmetric or kind.bits == 8):
                why_not = "offsets would be rounded to bfloat16 together with the zero-points"
            elif timed == SEPARATE:
                why_not, slower = "it was faster here", kernel
            else:
                return FUSED, kernel, "it takes float zeros"
    try:
        kernel = _find(kind)
    except NoKernel as reason:
        if slower is not None:
            return FUSED, slower, f"vLLM has none: {reason}"
        if forced in (None, FUSED) and not kind.has_offsets:  # not tried above
            with suppress(NoKernel):
                return FUSED, _find_fused(kind), f"vLLM has none: {reason}"
        if forced:
            raise _impossible(kind, forced, reason) from reason
        if kind.act_dtype not in (torch.float16, torch.bfloat16):
            raise QALoraError(
                f"{kind.prefix}: {reason} on this device. Serve with --dtype bfloat16 (or float16); or, to compute in "
                f"{kind.act_dtype} slowly in plain torch, set {PATH_VARIABLE}={DENSE}."
            ) from reason
        return DENSE, None, str(reason)
    return SEPARATE, kernel, "forced" if forced else why_not if kind.has_offsets else "nothing to add"


def _find(kind: LayerKind) -> Kernel:
    _check_sortable(kind)
    # With 8 bits Marlin takes no zero-points, and Machete rounds scales·zeros to the activations' dtype, a third of a
    # step in bfloat16: there they go into the offsets (kernels.moved_zeros).
    zero_points = kind.bits == 4 and not kind.symmetric
    return find_kernel(kind.bits, zero_points, kind.group_size, kind.act_dtype, kind.full_shape, kind.shape)


def _find_fused(kind: LayerKind) -> FloatZeroKernel | Int4PackKernel:
    _check_sortable(kind)
    return find_float_zero_kernel(kind.bits, kind.group_size, kind.act_dtype, kind.full_shape, kind.shape)


def _check_sortable(kind: LayerKind) -> None:
    if not kind.sortable:
        raise NoKernel("fused linears differ in their act-order, and a kernel takes one order of columns")


def _impossible(kind: LayerKind, forced: str, reason: NoKernel) -> QALoraError:
    return QALoraError(
        f"{kind.prefix} cannot be served by the path {forced} ({kind}): {reason}. Unset {PATH_VARIABLE} (and "
        f"{PATH_KEY} in the checkpoint's quantization_config) to let qalora choose, or force another path."
    )


def _name(kernel: Kernel) -> str:
    return type(kernel).__name__
