"""The second term of a merged linear, ``y += P(x)·offsets``: one opaque op, so torch.compile sees a single node. For
offsets that are held as factors, ``a·b``, there is another.

CUDA runs ``offsets_triton``, a CPU with bfloat16 instructions C++ (``qalora_plugin/kernels/cpu``); both round pooled
inputs and offsets to bfloat16: 0.2 % of the term, as every bfloat16 kernel rounds its scales. All
else runs torch, in float32.

Nothing here needs vLLM: what a GPU computes can be tested and timed where vLLM is not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qalora_plugin.kernels import cpu
from vllm_ext.kernels import cpu_int4

_SMALLEST = 1 << 11  # offsets; a layer with fewer is a toy, not worth the wait for the compiler


def prepare(offsets: Tensor, act_dtype: torch.dtype, group_size: int) -> Tensor:
    """Offsets ``[G, N]`` as :func:`add_offsets` reads them, converted once."""
    if _runs_triton(offsets):
        from vllm_ext.kernels import offsets_triton  # needs Triton, which a CPU may lack

        return offsets_triton.prepare(offsets, act_dtype, group_size)
    takes_panels = _takes_panels(offsets.device, act_dtype, offsets.numel())
    return cpu.offset_panels(offsets) if takes_panels else offsets.float()


def _takes_panels(device: torch.device, act_dtype: torch.dtype, numbers: int) -> bool:
    return device.type == "cpu" and act_dtype == torch.bfloat16 and numbers >= _SMALLEST and cpu.adds_offsets()


def add_offsets(y: Tensor, x: Tensor, offsets: Tensor, group_size: int) -> None:
    """``y += P(x)·offsets`` in place.

    Args:
        y: ``[..., N]``, contiguous. x: ``[..., K]``, the columns of a group side by side.
        offsets: from :func:`prepare`.
    """
    torch.ops.qalora.add_offsets(y, x, offsets, group_size)


def prepare_factors(a: Tensor, b: Tensor, act_dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Factors ``[G, r]``, ``[r, N]`` of offsets as :func:`add_factored` reads them; None where the offsets themselves,
    as :func:`add_offsets` reads them, would take no more memory."""
    groups, n = a.shape[0], b.shape[1]
    if _runs_triton(a):
        from vllm_ext.kernels import offsets_triton

        held = offsets_triton.prepare_factors(a, b, act_dtype)
        itemsize = b.itemsize if torch.float32 in (b.dtype, act_dtype) else act_dtype.itemsize
    else:
        held, itemsize = (a.float(), b.float()), 2 if _takes_panels(a.device, act_dtype, groups * n) else 4
    return held if held[0].nbytes + held[1].nbytes < itemsize * groups * n else None


def add_factored(y: Tensor, x: Tensor, a: Tensor, b: Tensor, group_size: int) -> None:
    """``y += P(x)·a·b`` in place; y and x as for :func:`add_offsets`, a and b from :func:`prepare_factors`."""
    torch.ops.qalora.add_factored(y, x, a, b, group_size)


def _add_factored(y: Tensor, x: Tensor, a: Tensor, b: Tensor, group_size: int) -> None:
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    if _runs_triton(x):
        from vllm_ext.kernels import offsets_triton

        offsets_triton.add_factored(y, x, a, b, group_size)
    else:
        y.add_(x.unflatten(-1, (-1, group_size)).sum(-1, dtype=torch.float32) @ a @ b)


def _add_factored_fake(y: Tensor, x: Tensor, a: Tensor, b: Tensor, group_size: int) -> None:
    return None


def _add_offsets(y: Tensor, x: Tensor, offsets: Tensor, group_size: int) -> None:
    y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    if _runs_triton(x):
        from vllm_ext.kernels import offsets_triton

        offsets_triton.add_offsets(y, x, offsets, group_size)
    elif offsets.ndim == 4:  # panels
        cpu.add_offsets(y, x, offsets, group_size)
    else:
        y.add_(x.unflatten(-1, (-1, group_size)).sum(-1, dtype=torch.float32) @ offsets)


def _add_offsets_fake(y: Tensor, x: Tensor, offsets: Tensor, group_size: int) -> None:
    return None


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.version.cuda is not None  # not ROCm, where the tf32 products are not available


_LIBRARY = torch.library.Library("qalora", "FRAGMENT")  # the ops live as long as it does


def define(name: str, function: Callable, fake: Callable, mutates: tuple[str, ...] = ()) -> None:
    """``torch.ops.qalora.<name>``, opaque to torch.compile. (``torch.library.custom_op`` costs more at every call.)"""
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qalora::{name}", fake, lib=_LIBRARY)


define("add_offsets", _add_offsets, _add_offsets_fake, mutates=("y",))
define("add_factored", _add_factored, _add_factored_fake, mutates=("y",))
define("int4_linear", cpu_int4.int4_linear, cpu_int4.int4_linear_fake)
