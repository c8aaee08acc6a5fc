"""The compiled CPU kernels as a :class:`~qalora_plugin.kernels.base.Kernel`."""

import torch
from torch import Tensor

from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels import cpu


class CompiledCpu:
    """Multiplies by the packed weight in C++, without unpacking all of it (bfloat16, on CPUs that multiply in it)."""

    def why_not(self, weight: GroupwiseWeight, dtype: torch.dtype, tokens: int | None = None) -> str | None:
        return cpu.why_not_multiply(weight, dtype)

    def describe(self, weight: GroupwiseWeight, dtype: torch.dtype) -> str:
        return "C++ multiplies by the packed weight (AVX512-BF16)"

    def forward(self, x: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None) -> Tensor:
        return cpu.matmul(x, weight, delta)

    def grad_input(self, dy: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None) -> Tensor:
        return cpu.matmul_transposed(dy, weight, delta)

    def pool(self, x: Tensor, weight: GroupwiseWeight) -> Tensor:
        return cpu.pool(x, weight.groups)

    def offset_gradient(self, pooled: Tensor, dy: Tensor) -> Tensor:
        return cpu.offset_gradient(pooled, dy)
