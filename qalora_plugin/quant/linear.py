"""The INT linear layer: a GPTQ weight exactly as its checkpoint stores it, with room for group-wise offsets."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import QALoraError
from ..kernels.dequant import dequantized
from ..kernels.linear import linear
from ..kernels.packed import PackedWeight
from .words import codes_per_period, words_per_period


class QuantLinear(nn.Module):
    """``y = x·[scales·(q − zeros) + offsets] + bias``, all tensors kept packed and in their checkpoint's dtype.

    Buffers (none is a parameter: they never train, and saving gives back the bytes that were loaded):
        qweight int32 ``[K·b/32, N]`` · qzeros int32 ``[G, N·b/32]`` · scales ``[G, N]`` · g_idx int32 ``[K]``
        · bias ``[N]`` or None · offsets ``[G, N]`` or None, in weight units: the trace of a merged adapter.

    Args:
        group_size: columns of K that share a scale; −1 means all of K.
        checkpoint_format: how ``qzeros`` is stored, ``"gptq"`` (v1, zeros − 1) or ``"gptq_v2"``.
        offset_dtype: dtype of ``offsets``; None for a layer without them.

    Raises:
        QALoraError: the sizes cannot be packed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        checkpoint_format: str = "gptq",
        bias: bool = False,
        offset_dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype = torch.float16,
        bias_dtype: torch.dtype = torch.float16,
        store_g_idx: bool = True,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        group_size = in_features if group_size == -1 else group_size
        if in_features % group_size:
            raise QALoraError(
                f"group size {group_size} does not divide in_features {in_features}. Pooling needs whole groups: "
                f"quantise the base again with a group size that divides {in_features}."
            )
        period = codes_per_period(bits)
        if in_features % period or out_features % period:
            raise QALoraError(
                f"a {in_features}×{out_features} linear cannot be packed at {bits} bits: "
                f"both sizes must be multiples of {period}."
            )
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.groups = bits, group_size, in_features // group_size
        self.checkpoint_format = checkpoint_format
        self.act_order = False
        self.base_fingerprint: Callable[..., str] | None = None  # of the checkpoint this comes from; set by its loader
        words, groups = words_per_period(bits), self.groups

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.register_buffer("qweight", empty(in_features // period * words, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", empty(groups, out_features // period * words, dtype=torch.int32))
        self.register_buffer("scales", empty(groups, out_features, dtype=scale_dtype))
        self.register_buffer("g_idx", empty(in_features, dtype=torch.int32), persistent=store_g_idx)
        self.register_buffer("bias", empty(out_features, dtype=bias_dtype) if bias else None)
        self.register_buffer("offsets", empty(groups, out_features, dtype=offset_dtype) if offset_dtype else None)
        self.register_buffer("group_order", None, persistent=False)

    def finalize(self) -> "QuantLinear":
        """Call once the buffers hold their values: derives what depends on ``g_idx``.

        Raises:
            QALoraError: ``g_idx`` does not put exactly ``group_size`` columns into every group.
        """
        in_order = torch.arange(self.in_features, dtype=torch.int32, device=self.qweight.device) // self.group_size
        if "g_idx" in self._non_persistent_buffers_set:
            self.g_idx = in_order
        self.act_order = not torch.equal(self.g_idx, in_order)
        if self.act_order:
            self.group_order = torch.argsort(self.g_idx, stable=True)
            if not torch.equal(self.g_idx[self.group_order], in_order):
                raise QALoraError(
                    f"g_idx does not assign exactly {self.group_size} columns to each of {self.groups} groups. "
                    "The checkpoint is damaged or uses a layout this project does not know."
                )
        return self

    @property
    def packed(self) -> PackedWeight:
        """The tensors as the kernels take them."""
        g_idx = self.g_idx if self.act_order else None
        return PackedWeight(
            self.qweight, self.qzeros, self.scales, self.offsets, g_idx, self.group_order,
            self.bits, self.group_size, self.checkpoint_format,
        )  # fmt: skip

    def forward(
        self, x: Tensor, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0
    ) -> Tensor:
        """``[..., K] → [..., N]``, with an adapter folded in if one is given: A ``[R, G]``, B ``[N, R]``."""
        y = linear(x, self.packed, lora_a, lora_b, scaling)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new dense ``[K, N]`` weight, offsets included. For tests, reports and exports."""
        with dequantized(self.packed, dtype) as weight:
            return weight.clone()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, act_order={self.act_order}, offsets={self.offsets is not None}"
        )


class ReadableQuantLinear(QuantLinear):
    """A :class:`QuantLinear` whose parent reads ``weight`` as well, to hand it to a fused kernel (Mamba's mixers).

    ``weight`` is a new dense ``[N, K]`` each time. It knows nothing of adapters, so none may be put on this layer.
    """

    weight_dtype = torch.float32
    _stand_in: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.dense_weight(self.weight_dtype).t() if self._stand_in is None else self._stand_in

    @weight.setter
    def weight(self, stand_in: Tensor) -> None:
        self._stand_in = stand_in

    @weight.deleter
    def weight(self) -> None:
        self._stand_in = None
