"""The second term of a merged linear, ``y += P(x)·offsets``: one opaque op, so torch.compile sees a single node.

CUDA runs Triton (``offsets_triton``), everything else torch. On a CPU, measured on two cores: up to half a million
multiplications a float32 product is fastest, since oneDNN's bfloat16 GEMM costs 30 µs before it starts; above, that
GEMM wins two to five times and adds into y on its way. So a layer that computes in bfloat16 on a CPU holds its offsets
twice. Rounded to bfloat16 they lose 0.2 %, as the scales do in every bfloat16 kernel.
"""

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from . import int4_cpu

_SMALL = 1 << 19  # multiplications


def prepare(offsets: Tensor, act_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Offsets ``[G, N]`` as :func:`add_offsets` reads them, converted once: ``values`` and ``rounded``."""
    if _runs_triton(offsets):
        return offsets, None
    return offsets.float(), offsets.bfloat16() if act_dtype == torch.bfloat16 and offsets.device.type == "cpu" else None


def add_offsets(y: Tensor, x: Tensor, values: Tensor, rounded: Tensor | None) -> None:
    """``y += P(x)·offsets`` in place.

    Args:
        y: ``[..., N]``, contiguous. x: ``[..., K]``, the columns of a group side by side.
        values, rounded: ``[G, N]`` in weight units, from :func:`prepare`.
    """
    torch.ops.vllm.qalora_add_offsets(y, x, values, rounded)


def register() -> None:
    """Define ``torch.ops.vllm.qalora_…``, opaque to torch.compile; again is harmless."""
    if not hasattr(torch.ops.vllm, "qalora_add_offsets"):
        direct_register_custom_op("qalora_add_offsets", _add_offsets, mutates_args=["y"], fake_impl=_add_offsets_fake)
        direct_register_custom_op("qalora_int4_linear", int4_cpu.int4_linear, fake_impl=int4_cpu.int4_linear_fake)


def _add_offsets(y: Tensor, x: Tensor, values: Tensor, rounded: Tensor | None) -> None:
    groups, n = values.shape
    y, x = y.view(-1, n), x.reshape(-1, x.shape[-1])
    if _runs_triton(x):
        from . import offsets_triton  # needs Triton, which a CPU may lack

        offsets_triton.add_offsets(y, x, values)
        return
    grouped = x.view(x.shape[0], groups, -1)
    if rounded is None or x.shape[0] * groups * n <= _SMALL:
        y.add_(grouped.sum(-1, dtype=torch.float32) @ values)
    else:
        y.addmm_(grouped.sum(-1), rounded)  # both accumulate in float32 and round once


def _add_offsets_fake(y: Tensor, x: Tensor, values: Tensor, rounded: Tensor | None) -> None:
    return None


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.version.cuda is not None  # not ROCm, where the tf32 products are not available
