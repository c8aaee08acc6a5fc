"""Packed weight → dense weight in a shared scratch buffer, offsets and adapter added on the way.

Which implementation runs is decided here: Triton on CUDA, C++ on a CPU, plain torch for the rest (float64; other
devices; 3 bits and act-order on a CPU).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

import torch
from torch import Tensor

from . import cpu, planes
from .packed import PackedWeight

_Place = tuple[torch.device, torch.dtype, int]  # the last: which CUDA stream, 0 elsewhere

_scratch: dict[_Place, Tensor] = {}
_views: dict[tuple[_Place, int, int], Tensor] = {}
_in_use = RLock()


@contextmanager
def scratch(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A ``[rows, cols]`` view of the one scratch buffer per device, dtype and CUDA stream.

    It is the caller's inside the ``with`` block: other threads wait. (On CUDA it is enough to launch inside what reads
    the buffer, since a stream keeps the order.)
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _in_use:
        yield _view((device, dtype, stream), rows, cols)


def _view(place: _Place, rows: int, cols: int) -> Tensor:
    view = _views.get((place, rows, cols))
    if view is not None:
        return view
    device, dtype, _ = place
    size = rows * cols
    with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
        if place not in _scratch or _scratch[place].numel() < size:
            for old in [known for known in _views if known[0] == place]:
                del _views[old]
            _scratch[place] = torch.empty(size, dtype=dtype, device=device)
        view = _views[place, rows, cols] = _scratch[place][:size].view(rows, cols)
    return view


@contextmanager
def dequantized(
    packed: PackedWeight,
    dtype: torch.dtype,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
) -> Iterator[Tensor]:
    """``w + offsets + scaling·(B·A)ᵀ``, dense ``[K, N]``, in the shared scratch: gone after the ``with`` block.

    Args:
        dtype: of the result; arithmetic is float32 or better, rounded once.
        lora_a: ``[R, G]``, lora_b: ``[N, R]``, both or neither.
    """
    with scratch(packed.in_features, packed.out_features, dtype, packed.qweight.device) as out:
        with torch.no_grad():
            _fill(packed, lora_a, lora_b, scaling, out)
        yield out


def _fill(packed: PackedWeight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, out: Tensor) -> None:
    if cpu.takes(packed, out.dtype):
        cpu.fill(packed, lora_a, lora_b, scaling, out)
        return
    offsets = effective_offsets(packed.offsets, lora_a, lora_b, scaling)
    if runs_triton(out):
        from . import gpu  # Triton is not everywhere

        gpu.fill(packed, offsets, out)
    else:
        planes.fill(packed, offsets, out)


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels are for this tensor: NVIDIA, where they were written for, and not float64."""
    return tensor.is_cuda and torch.version.cuda is not None and tensor.dtype != torch.float64


def gemm_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What to multiply tensors of ``dtype`` in: float32 where a CPU only emulates ``dtype``."""
    return torch.float32 if device.type == "cpu" and emulates(dtype) else dtype


@cache
def emulates(dtype: torch.dtype) -> bool:
    """Whether a GEMM in ``dtype`` is emulated on this CPU.

    Without AVX512 a bfloat16 one takes up to 75 times as long as in float32 (torch 2.13, AVX2).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    ops = torch.ops.mkldnn
    return not (ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


def effective_offsets(
    offsets: Tensor | None, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float
) -> Tensor | None:
    """``offsets + scaling·(B·A)ᵀ`` [G, N], float32 or better."""
    if lora_a is None:
        return offsets
    math_dtype = torch.promote_types(lora_a.dtype, torch.float32)
    lora_a, lora_b = lora_a.to(math_dtype).t(), lora_b.to(math_dtype).t()
    if offsets is None:
        return scaled_product(lora_a, lora_b, scaling)
    return torch.addmm(offsets.to(math_dtype), lora_a, lora_b, alpha=scaling)


def scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``scaling·(a·b)`` in one kernel."""
    return torch.addmm(a.new_empty(1, 1), a, b, beta=0, alpha=scaling)  # beta = 0: what is added is not even read
