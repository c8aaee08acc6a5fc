"""The INT linear layer: a groupwise quantized weight, codes packed as on disk, that never trains."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qalora_plugin.core.delta import OffsetDelta, ScaleDelta
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight, completed
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels.autograd import linear
from qalora_plugin.kernels.unpacking import dequantized
from qalora_plugin.layers.sharding import Layout, flatten, views

_HELD = (
    "qweight",
    "zeros",
    "scales",
    "offsets",
    "g_idx",
    "group_order",
    "scales_delta",
    "offsets_a",
    "offsets_b",
    "bias",
)


class QuantLinear(nn.Module):
    """``y = x·[scales·(q − zeros) + offsets] + bias``.

    Its tensors are those of a :class:`~qalora_plugin.core.weight.GroupwiseWeight`, as buffers: none is a parameter, for
    they never train. A new layer is empty; :meth:`set_weight` fills it. Where a checkpoint stores ``scales_delta``
    beside the scales, the layer holds both as stored, half the size of their sum in float32; where it stores the
    offsets' factors, those (multiplied at every use: 1/g of the work that dequantizing is, times their rank). Where
    ranks share the weight between them, it is in ``words`` instead (:mod:`.sharding`).

    Args:
        spec: sizes, bits and group size.

    Raises:
        QALoraError: the sizes cannot be packed.
    """

    qweight: Tensor  # None, like all of these, until there is a weight
    zeros: Tensor
    scales: Tensor
    scales_delta: Tensor | None
    offsets: Tensor | None
    offsets_a: Tensor | None
    offsets_b: Tensor | None
    g_idx: Tensor | None
    group_order: Tensor | None
    bias: Tensor | None
    words: nn.Parameter | None

    def __init__(self, spec: GroupwiseSpec):
        super().__init__()
        require_packable(spec)
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.bits, self.group_size, self.groups = spec.bits, spec.group_size, spec.groups
        self.base_fingerprint: Callable[..., str] | None = None  # of the checkpoint this comes from; set by its loader
        for name in _HELD:
            self.register_buffer(name, None, persistent=name != "group_order")
        self.register_parameter("words", None)
        self._layout: Layout | None = None

    def set_weight(self, weight: GroupwiseWeight, bias: Tensor | None = None) -> "QuantLinear":
        """Hold these tensors. bias: ``[N]`` or None."""
        self.qweight, self.zeros, self.scales = weight.qweight, weight.zeros, weight.scales
        self.offsets, self.g_idx, self.group_order = weight.offsets, weight.g_idx, weight.group_order
        self.scales_delta, self.offsets_a, self.offsets_b, self.bias = None, None, None, bias
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """``model.half()``, ``model.to(torch.bfloat16)`` and their like move what is held, and cast none of it: scales
        in bfloat16 would be 0.35 % off. (A cast of ``words`` is found at their next use.)"""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype or tensor is self.words else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.group_order is not None and self.g_idx is not None:  # it follows from g_idx, and is not stored
            self.group_order = torch.argsort(self.g_idx, stable=True)

    def make_shardable(self, dtype: torch.dtype) -> None:
        """Move all tensors into ``words``, a parameter of the model's own ``dtype``."""
        if self.words is None:
            self.words, self._layout = flatten([getattr(self, name) for name in _HELD], dtype)
            for name in _HELD:
                setattr(self, name, None)

    def tensors(self) -> list[Tensor | None]:
        """All that the layer holds, as it is stored; taken anew at every use, since ``words`` come and go."""
        if self.words is None or self._layout is None:
            return [getattr(self, name) for name in _HELD]
        return views(self.words, self._layout)

    def named_tensors(self) -> dict[str, Tensor | None]:
        """:meth:`tensors` by the names of the buffers that they are, or were."""
        return dict(zip(_HELD, self.tensors(), strict=True))

    def held(self) -> tuple[GroupwiseWeight, Tensor | None]:
        """The weight as kernels and formats take it, and the bias ``[N]``."""
        *weight, change, a, b, bias = self.tensors()
        return completed(GroupwiseWeight.of(weight, self.bits, self.group_size), change, a, b), bias

    @property
    def has_whole_groups(self) -> bool:
        """Whether groups are columns in order, of whole words."""
        place = _HELD.index("g_idx")
        in_order = self.g_idx is None if self._layout is None else self._layout.parts[place] is None
        return in_order and self.group_size % codes_per_period(self.bits) == 0

    @property
    def quantized(self) -> GroupwiseWeight:
        return self.held()[0]

    def forward(self, x: Tensor, delta: OffsetDelta | None = None, scale_delta: ScaleDelta | None = None) -> Tensor:
        """``[..., K] → [..., N]``, with an adapter folded in if one is given."""
        *weight, change, a, b, bias = self.tensors()
        y = linear(x, GroupwiseWeight.of(weight, self.bits, self.group_size), delta, scale_delta, (change, a, b))
        return y if bias is None else y + bias.to(y.dtype)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new dense ``[K, N]`` weight, offsets included. For tests, reports and exports."""
        with dequantized(self.quantized, dtype) as weight:
            return weight.clone()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, act_order={self._has('g_idx')}, "
            f"offsets={self._has('offsets') or self._has('offsets_a')}"
        )

    def _has(self, name: str) -> bool:
        return (getattr(self, name) if self._layout is None else self._layout.parts[_HELD.index(name)]) is not None


def require_packable(spec: GroupwiseSpec) -> None:
    """Refuse sizes that whole groups and whole words do not make up."""
    if spec.group_size < 1 or spec.in_features % spec.group_size:
        raise QALoraError(
            f"group size {spec.group_size} does not divide in_features {spec.in_features}. Pooling needs whole groups: "
            f"quantise the base again with a group size that divides {spec.in_features}."
        )
    period = codes_per_period(spec.bits)
    if spec.in_features % period or spec.out_features % period:
        raise QALoraError(
            f"a {spec.in_features}×{spec.out_features} linear cannot be packed at {spec.bits} bits: "
            f"both sizes must be multiples of {period}."
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
