"""The second term of a merged linear, ``y += P(x)·offsets``: one opaque op, so torch.compile sees a single node."""

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

_NAME = "qalora_add_offsets"


def _add_offsets(y: Tensor, x: Tensor, offsets: Tensor) -> None:
    groups = offsets.shape[0]
    # float32 throughout: sums of g activations overflow float16, and bfloat16 would round offsets by 0.2 %.
    pooled = x.unflatten(-1, (groups, x.shape[-1] // groups)).sum(-1, dtype=torch.float32)
    y.add_(pooled @ offsets.float())


def _add_offsets_fake(y: Tensor, x: Tensor, offsets: Tensor) -> None:
    return None


def register() -> None:
    """Define ``torch.ops.vllm.qalora_add_offsets``; again is harmless."""
    if not hasattr(torch.ops.vllm, _NAME):
        direct_register_custom_op(_NAME, _add_offsets, mutates_args=["y"], fake_impl=_add_offsets_fake)


def add_offsets(y: Tensor, x: Tensor, offsets: Tensor) -> None:
    """``y += P(x)·offsets`` in place.

    Args:
        y: ``[..., N]``. x: ``[..., K]``, the columns of a group side by side. offsets: ``[G, N]`` in weight units.
    """
    torch.ops.vllm.qalora_add_offsets(y, x, offsets)
