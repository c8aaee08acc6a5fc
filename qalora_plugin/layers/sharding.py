"""A packed weight in the one form that FSDP2 and DeepSpeed ZeRO-3 can shard, and an adapter's factors likewise.

Both shard parameters and copy buffers to every rank. Both expect floats, and cast them where a mixed precision policy
says so. So the tensors of a linear become **one flat frozen parameter**, their bytes seen as numbers of the model's
own float dtype: what shards, gathers, scatters and broadcasts it moves bits and computes nothing. Scales as a float
parameter of their own would be cast (float16 to bfloat16: 0.35 % off).

The parameter is whole only while a module that holds it runs, so views of it are taken at every use.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qalora_plugin.core.errors import QALoraError

_ALIGNMENT = 64  # bytes; what a kernel may count on of a tensor that torch allocated


class Part(NamedTuple):
    """Where one tensor lies, in bytes, and what it is."""

    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Layout(NamedTuple):
    """What lies where in a flat parameter.

    Attributes:
        parts: None for a tensor that the layer does not have.
        dtype: in which the bytes are seen. nbytes: of all.
    """

    parts: tuple[Part | None, ...]
    dtype: torch.dtype
    nbytes: int


def flatten(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[nn.Parameter, Layout]:
    """One frozen parameter ``[bytes / itemsize]`` of the bytes of all ``tensors``, on the meta device if the first is.

    Args:
        dtype: of the parameter, the model's own and so that of mixed precision's ``param_dtype``.
    """
    parts: list[Part | None] = []
    end = 0
    for tensor in tensors:
        if tensor is None:
            parts.append(None)
            continue
        parts.append(Part(end, end + tensor.nbytes, tuple(tensor.shape), tensor.dtype))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    device = next(tensor.device for tensor in tensors if tensor is not None)
    flat = torch.zeros(end, dtype=torch.uint8, device=device)
    if not flat.is_meta:
        for part, tensor in zip(parts, tensors, strict=True):
            if part is not None and tensor is not None:
                flat[part.start : part.stop] = tensor.contiguous().reshape(-1).view(torch.uint8)
    return nn.Parameter(flat.view(dtype), requires_grad=False), Layout(tuple(parts), dtype, end)


def views(flat: Tensor, layout: Layout) -> list[Tensor | None]:
    """The tensors again, as views; ``flat`` is whole, as it is while the module runs.

    Raises:
        QALoraError: mixed precision has cast the words, or they are sharded at the moment.
    """
    if flat.dtype != layout.dtype:
        raise QALoraError(
            f"packed weights were cast from {_name(layout.dtype)} to {_name(flat.dtype)}, which destroys them. Mixed "
            f"precision must compute in the dtype that the base was loaded in: load it in {_name(flat.dtype)} (with "
            f"Axolotl, bf16: true does), or set mixed precision to {_name(layout.dtype)}."
        )
    if hasattr(flat, "device_mesh") or flat.numel() * flat.itemsize != layout.nbytes:
        raise QALoraError(
            "this packed weight is sharded over the ranks and can be read only while the model runs. Read it from the "
            "base's files instead."
        )
    data = flat.detach().view(torch.uint8)
    return [
        None if part is None else data[part.start : part.stop].view(part.dtype).view(part.shape)
        for part in layout.parts
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class ShardedFactor(nn.Linear):
    """A factor of an adapter that FSDP2 shards by itself: called without an input it gives its weight.

    The hooks that make the weight whole fire in a call, and free it after it: hence the copy.
    """

    def forward(self, x: Tensor | None = None) -> Tensor:
        return self.weight.clone() if x is None else super().forward(x)


class StackedFactors(nn.Module):
    """A or B of all experts of a layer, under the name that PEFT gives a linear's."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class ShardedStack(StackedFactors):
    """The same that FSDP2 shards by itself, as :class:`ShardedFactor` is."""

    def forward(self) -> Tensor:
        return self.weight.clone()


def factor(held: nn.Linear | StackedFactors) -> Tensor:
    """The whole weight of a factor, sharded or not."""
    return held() if isinstance(held, (ShardedFactor, ShardedStack)) else held.weight


def make_factor_shardable(held: nn.Linear | StackedFactors) -> None:
    """Give a factor the class that :func:`factor` calls, and memory if it has none: by its address accelerate knows
    the optimizer's."""
    held.__class__ = ShardedStack if isinstance(held, StackedFactors) else ShardedFactor
    if held.weight.is_meta:
        held.to_empty(device="cpu")
