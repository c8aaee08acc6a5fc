"""What the hardware computes in, and which of our kernels are for it."""

from functools import cache

import torch
from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels are for this tensor: NVIDIA, where they were written for, and not float64."""
    return tensor.is_cuda and torch.version.cuda is not None and tensor.dtype != torch.float64


def triton_has_tensor_cores(tensor: Tensor) -> bool:
    """Whether a Triton kernel multiplies tensors like this one on tensor cores: 16 bits, from Ampere on (it does not
    know Turing's)."""
    if not runs_triton(tensor) or tensor.dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast asks for on its device, if it is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if kind != "meta" and torch.is_autocast_enabled(kind) else x


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
