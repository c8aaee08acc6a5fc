"""Stock kernels of vLLM for one symmetric 4-bit linear, called as vLLM's kernel classes call them, without vLLM.

The ops come from the library that ``gpu_bundle.py`` takes out of vLLM's wheel; what each tensor must look like is in
``vllm/model_executor/kernels/linear/mixed_precision`` and ``…/quantization/utils/marlin_utils.py`` (0.33.0).
"""

import lzma
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
_UINT4, _UINT4B8 = 1125899906843648, 1125899907892224  # ids of vLLM's scalar types
_SCALES = [i + 8 * j for i in range(8) for j in range(8)]  # Marlin's order of 64 columns where a group ends inside K


def load(bundle: Path | None) -> bool:
    """Load the ops of a bundle; False where there is none, or no GPU."""
    packed = bundle and bundle / "vllm_ops.so.xz"
    if not (packed and packed.is_file() and torch.cuda.is_available()):
        return False
    library = bundle / "vllm_ops.so"
    if not library.is_file():
        library.write_bytes(lzma.decompress(packed.read_bytes()))
    torch.ops.load_library(library)
    return True


def marlin(qweight: Tensor, scales: Tensor, k: int, n: int) -> Linear:
    """``x·w``; GPTQ words ``[K/8, N]`` with zero-points of 8, scales ``[G, N]`` in the dtype of x."""
    words = torch.ops._C.gptq_marlin_repack(qweight, k, n, 4, False)
    permuted = scales.reshape(-1, 64)[:, _SCALES].reshape(-1, n).contiguous()
    locks = torch.zeros(torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.int32, device="cuda")

    def linear(x: Tensor) -> Tensor:
        return torch.ops._C.marlin_gemm(
            x, None, words, None, permuted, None, None, None, locks, _UINT4B8, x.shape[0], n, k, False, True, False
        )

    return linear


def machete(qweight: Tensor, scales: Tensor, group_size: int, zeros: Tensor | None = None) -> Linear:
    """``x·w``, likewise; ``zeros`` [G, N], any float in the dtype of x, are added to ``scales·q`` (Hopper)."""
    kind = _UINT4B8 if zeros is None else _UINT4
    words = torch.ops._C.machete_prepack_B(qweight.t().contiguous().t(), scales.dtype, kind, scales.dtype)

    def linear(x: Tensor) -> Tensor:
        return torch.ops._C.machete_mm(x, words, kind, None, scales, zeros, group_size, None, None, None)

    return linear


def machete_takes(group_size: int) -> bool:
    return torch.cuda.get_device_capability() == (9, 0) and group_size in (64, 128)
