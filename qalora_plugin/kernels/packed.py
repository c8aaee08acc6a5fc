"""A packed weight as the kernels take it: the tensors of a GPTQ linear and how to read them."""

from typing import NamedTuple

from torch import Tensor

from ..quant.layout import read_zeros


class PackedWeight(NamedTuple):
    """``w[k,n] = scales[γ,n]·(q[k,n] − zeros[γ,n]) + offsets[γ,n]``; a tuple, to spread into the ops' arguments.

    Attributes:
        qweight: int32 ``[K·b/32, N]``. qzeros: int32 ``[G, N·b/32]``. scales: ``[G, N]``.
        offsets: ``[G, N]`` in weight units, or None.
        g_idx: int32 ``[K]``, the group of each column in act-order; None where groups are consecutive.
        group_order: int64 ``[K]``, columns sorted by group; None likewise.
        checkpoint_format: how ``qzeros`` is stored, ``"gptq"`` (v1) or ``"gptq_v2"``.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    offsets: Tensor | None
    g_idx: Tensor | None
    group_order: Tensor | None
    bits: int
    group_size: int
    checkpoint_format: str

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    @property
    def in_features(self) -> int:
        return self.groups * self.group_size

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    def zeros(self) -> Tensor:
        """Integer zero-points, ``[G, N]``."""
        return read_zeros(self.qzeros, self.bits, self.checkpoint_format)
