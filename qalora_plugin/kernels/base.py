"""What a kernel is: a way to multiply by a packed weight, with what an adapter adds to it folded in."""

from typing import Protocol

import torch
from torch import Tensor

from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.weight import GroupwiseWeight


class Kernel(Protocol):
    """``w' = scales·(q − zeros) + offsets + delta``; the kernels are in :mod:`.select`, the fastest first."""

    def why_not(self, weight: GroupwiseWeight, dtype: torch.dtype, tokens: int | None = None) -> str | None:
        """Why this kernel does not multiply activations of ``dtype`` by ``weight``; None if it does.

        Args:
            tokens: how many there are; None: some thousands, as in training.
        """

    def describe(self, weight: GroupwiseWeight, dtype: torch.dtype) -> str:
        """How it computes, in words."""

    def forward(self, x: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None) -> Tensor:
        """``x·w'``, ``[..., K] → [..., N]``."""

    def grad_input(self, dy: Tensor, weight: GroupwiseWeight, delta: OffsetDelta | None) -> Tensor:
        """``dy·w'ᵀ``, ``[..., N] → [..., K]``."""

    def pool(self, x: Tensor, weight: GroupwiseWeight) -> Tensor:
        """``P(x)``, ``[..., K] → [..., G]``."""

    def offset_gradient(self, pooled: Tensor, dy: Tensor) -> Tensor:
        """``dE = P(x)ᵀ·dy`` of ``[T, G]`` and ``[T, N]``: ``[G, N]``, float32 where sums are."""
