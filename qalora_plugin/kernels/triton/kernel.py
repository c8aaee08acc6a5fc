"""Few tokens on CUDA, as in generation during training: one Triton kernel instead of unpacking and a GEMM."""

import torch
from torch import Tensor

from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels.hardware import runs_triton
from qalora_plugin.kernels.unpacking import UnpackAndMultiply


class FewTokens(UnpackAndMultiply):
    """Multiplies a few tokens straight from the packed weight, where that was measured to be faster."""

    def why_not(self, weight: GroupwiseWeight, dtype: torch.dtype, tokens: int | None = None) -> str | None:
        if tokens is None or not weight.qweight.is_cuda or not runs_triton(weight.scales):
            return "it is for few tokens on CUDA"
        from qalora_plugin.kernels.triton import dequantize  # Triton is not everywhere

        if not dequantize.takes_matmul(tokens, weight):
            return f"it takes up to {dequantize.MAX_TOKENS} tokens, and groups in order that hold whole words"
        return None if dequantize.matmul_wins(tokens, dtype, weight) else "unpacking was faster"

    def describe(self, weight: GroupwiseWeight, dtype: torch.dtype) -> str:
        return "one Triton kernel unpacks and multiplies"

    def forward(self, x: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None) -> Tensor:
        from qalora_plugin.kernels.triton import dequantize

        return dequantize.matmul(x, weight, weight.offsets if delta is None else delta.materialize(weight.offsets))
