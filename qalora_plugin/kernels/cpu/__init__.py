"""Kernels for CPUs in C++, compiled at the first use (a few seconds, cached on disk).

``fill.cpp`` unpacks a weight into a dense one in one pass where plain torch makes some fifty; ``scales.cpp`` makes
trained scales, and sums up their gradient, of the tokens that ``representatives.cpp`` chooses. ``matmul.cpp``
multiplies without a dense weight, as fast as oneDNN multiplies with one; ``pooled.cpp`` is what an adapter adds. These
two need bfloat16 instructions (AVX512-BF16: AMD since Zen 4, Intel's Cooper Lake and successors); where there is AMX,
torch multiplies. Without a C++ compiler :mod:`..planes` does the work.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels.cpu.build import library

SMALLEST = 1 << 18  # weights; a model of smaller layers is a toy, not worth the wait for the compiler


class _Problem(ctypes.Structure):
    """``struct Problem`` of problem.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qweight", "zeros", "scales", "offsets", "lora_a", "lora_b")),
        *((name, ctypes.c_int64) for name in ("rank", "groups", "group_size", "n")),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("bits", "half_scales", "threads")),
    )

    def __init__(self, weight: GroupwiseWeight, delta: OffsetDelta | None):
        half = weight.scales.dtype == torch.float16
        scales = weight.scales if half else weight.scales.float()
        offsets = None if weight.offsets is None else weight.offsets.float()
        a, b = (None, None) if delta is None else (t.float().contiguous() for t in (delta.lora_a, delta.lora_b))
        tensors = weight.qweight, weight.zeros, scales, offsets, a, b
        super().__init__(
            *(None if t is None else t.data_ptr() for t in tensors),
            0 if a is None else len(a), weight.groups, weight.group_size, weight.out_features,
            1.0 if delta is None else delta.scaling, weight.bits, half, torch.get_num_threads(),
        )  # fmt: skip
        self.tensors = tensors  # they live as long as the pointers


def why_not_fill(weight: GroupwiseWeight, dtype: torch.dtype) -> str | None:
    """Why :func:`fill` cannot unpack this weight, or is not worth its compilation; None if it does."""
    if weight.qweight.device.type != "cpu":
        return f"it is on {weight.qweight.device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} is neither float32 nor bfloat16"
    if weight.bits == 3:
        return "3-bit codes straddle words"
    if weight.g_idx is not None:
        return "act-order scatters its groups"
    if weight.group_size % codes_per_period(weight.bits):
        return f"groups of {weight.group_size} do not fill whole words of {weight.bits}-bit codes"
    if weight.in_features * weight.out_features < SMALLEST:
        return f"layers below {SMALLEST} weights are not worth the wait for the compiler"
    return None if library() is not None else "the C++ kernels could not be compiled (install g++)"


def why_not_multiply(weight: GroupwiseWeight, dtype: torch.dtype) -> str | None:
    """Why :func:`matmul` does not multiply by this weight; None if it does."""
    if dtype != torch.bfloat16:
        return f"{dtype} is not bfloat16"
    if reason := why_not_fill(weight, dtype):
        return reason
    found = _compiled().qalora_bfloat16()
    return {0: "this CPU lacks AVX512-BF16", 2: "with AMX, torch's GEMM is faster"}.get(found)


def fill(weight: GroupwiseWeight, delta: OffsetDelta | None, out: Tensor) -> None:
    """Write the effective weight, offsets and adapter included, to ``out`` ``[K, N]``."""
    problem = _Problem(weight, delta)
    _compiled().qalora_fill(ctypes.byref(problem), out.data_ptr(), out.dtype == torch.bfloat16)


def matmul(x: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None) -> Tensor:
    """``x·w'``, bfloat16 ``[..., K] → [..., N]``."""
    return _matmul(_compiled().qalora_matmul, x, weight.out_features, _Problem(weight, delta))


def matmul_transposed(dy: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None) -> Tensor:
    """``dy·w'ᵀ``, bfloat16 ``[..., N] → [..., K]``."""
    return _matmul(_compiled().qalora_matmul_transposed, dy, weight.in_features, _Problem(weight, delta))


def pool(x: Tensor, groups: int) -> Tensor:
    """``P(x)``: bfloat16 x summed over each group, ``[..., K] → [..., G]``."""
    x = x.contiguous()
    group_size = x.shape[-1] // groups
    pooled = x.new_empty(*x.shape[:-1], groups)
    _compiled().qalora_pool(x.data_ptr(), _rows(pooled), groups, group_size, pooled.data_ptr(), torch.get_num_threads())
    return pooled


def offset_gradient(pooled: Tensor, dy: Tensor) -> Tensor:
    """``dE = P(x)ᵀ·dy``: bfloat16 ``[T, G]`` and ``[T, N]`` → float32 ``[G, N]``."""
    dy = dy.contiguous()
    (tokens, groups), n = pooled.shape, dy.shape[1]
    pooled_t = pooled.new_zeros(groups, tokens + tokens % 2)  # the kernel takes tokens in pairs
    pooled_t[:, :tokens] = pooled.t()
    gradient = dy.new_empty(groups, n, dtype=torch.float32)
    _compiled().qalora_offset_gradient(
        pooled_t.data_ptr(), dy.data_ptr(), tokens, groups, n, gradient.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return gradient


def factor_gradient(along: Tensor, weight: GroupwiseWeight, gradient: Tensor) -> None:
    """``Σ_{k∈γ} scales·(q − zeros)·along`` of ``along`` ``[K, N]``, float32 or bfloat16, to ``gradient`` ``[G, N]``."""
    problem = _Problem(weight, None)
    _compiled().qalora_factor_gradient(
        ctypes.byref(problem), along.data_ptr(), along.dtype == torch.bfloat16, gradient.data_ptr()
    )


def factor_gradient_of(x: Tensor, dy: Tensor, weight: GroupwiseWeight) -> Tensor:
    """The same of ``along = xᵀ·dy``, bfloat16 ``[T, K]`` and ``[T, N]``, which is never written; where :func:`matmul`
    runs. float32 ``[G, N]``."""
    dy, tokens = dy.contiguous(), len(x)
    x_t = x.new_zeros(x.shape[1], tokens + tokens % 2)  # the kernel takes tokens in pairs
    x_t[:, :tokens] = x.t()
    gradient = dy.new_empty(weight.groups, weight.out_features, dtype=torch.float32)
    problem = _Problem(weight, None)
    _compiled().qalora_factor_gradient_of(
        ctypes.byref(problem), x_t.data_ptr(), dy.data_ptr(), tokens, gradient.data_ptr()
    )
    return gradient


def in_steps(
    weight: GroupwiseWeight, delta: OffsetDelta | None, d: Tensor, c: Tensor
) -> tuple[GroupwiseWeight, OffsetDelta | None]:
    """The weight with scales that D ``[G, R]`` and C ``[R, N]`` change, and what ``delta`` adds in units of them."""
    d, c = d.float().contiguous(), c.float().contiguous()
    scales = weight.scales.new_empty(weight.scales.shape, dtype=torch.float32)
    offsets = None if delta is None else torch.empty_like(scales)
    problem = _Problem(weight, delta)
    _compiled().qalora_in_steps(
        ctypes.byref(problem), d.data_ptr(), c.data_ptr(), len(c), scales.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
    )  # fmt: skip
    return weight._replace(scales=scales, offsets=weight.offsets if offsets is None else offsets), None


def takes_representatives(x: Tensor, dy: Tensor) -> bool:
    """Whether :func:`representatives` is for ``[T, K]`` and ``[T, N]``, of layers that are worth compiling for."""
    return (
        x.device.type == "cpu"
        and x.dtype == dy.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and len(x) == len(dy)
        and x.shape[1] * dy.shape[1] >= SMALLEST
        and library() is not None
    )


def representatives(x: Tensor, dy: Tensor, count: int, place: float) -> tuple[Tensor, Tensor, float, Tensor]:
    """:func:`qalora_plugin.kernels.scales.representatives`: rows of x and dy, their share and their numbers."""
    x, dy, share = x.contiguous(), dy.contiguous(), ctypes.c_double()
    some_x, some_dy = x.new_empty(count, x.shape[1]), dy.new_empty(count, dy.shape[1])
    rows = x.new_empty(count, dtype=torch.int64)
    _compiled().qalora_representatives(
        x.data_ptr(), dy.data_ptr(), x.dtype == torch.bfloat16, len(x), x.shape[1], dy.shape[1], count, place,
        some_x.data_ptr(), some_dy.data_ptr(), rows.data_ptr(), ctypes.byref(share), torch.get_num_threads(),
    )  # fmt: skip
    return some_x, some_dy, share.value, rows


def adds_offsets() -> bool:
    """Whether this CPU runs :func:`add_offsets`."""
    return library() is not None and _compiled().qalora_bfloat16() > 0


def offset_panels(offsets: Tensor) -> Tensor:
    """Offsets ``[G, N]`` as :func:`add_offsets` reads them: bfloat16 ``[⌈N/64⌉, ⌈G/2⌉, 64, 2]``, padded with zeros."""
    groups, n = offsets.shape
    padded = functional.pad(offsets, (0, -n % 64, 0, groups % 2)).bfloat16()
    return padded.unflatten(0, (-1, 2)).unflatten(-1, (-1, 64)).permute(2, 0, 3, 1).contiguous()


def add_offsets(y: Tensor, x: Tensor, panels: Tensor, group_size: int) -> None:
    """``y += P(x)·offsets`` in place; bfloat16 ``[T, N]`` (contiguous), ``[T, K]``, and :func:`offset_panels`."""
    x = x.contiguous()
    _compiled().qalora_add_offsets(
        x.data_ptr(), x.shape[0], x.shape[1] // group_size, group_size,
        panels.data_ptr(), y.shape[1], y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def _matmul(function: Callable[..., None], x: Tensor, columns: int, problem: _Problem) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], columns)
    function(ctypes.byref(problem), x.data_ptr(), _rows(x), out.data_ptr())
    return out


def _rows(tensor: Tensor) -> int:
    return tensor.numel() // tensor.shape[-1]


def _compiled() -> ctypes.CDLL:
    """:func:`library`, where :func:`why_not_fill` has found it."""
    found = library()
    assert found is not None
    return found
