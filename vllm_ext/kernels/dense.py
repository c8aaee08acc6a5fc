"""Plain torch, for layers that no kernel of vLLM takes: dequantise (offsets included), then one matmul.

Correct for every bit width, dtype and act-order, and slow: the weight stays packed and is unpacked at every call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qalora_plugin.core.packing import unpack_rows


def dense_weight(
    qweight: Tensor, zeros: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """``scales·(q − zeros) + offsets`` → ``[K, N]``, in float32, rounded once to ``dtype``.

    Args:
        qweight: int32 ``[K·b/32, N]``, the rows of a group side by side.
        zeros: uint8 ``[G, N]``. scales: ``[G, N]``. offsets: ``[G, N]`` or None.
    """
    grouped = unpack_rows(qweight, bits).unflatten(0, (scales.shape[0], -1)).float()
    weight = (grouped - zeros[:, None].float()) * scales[:, None].float()
    if offsets is not None:
        weight = weight + offsets[:, None].float()
    return weight.flatten(0, 1).to(dtype)


def matmul(x: Tensor, weight: Tensor, order: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """``x·weight``, x ``[..., K]`` in checkpoint order → ``[..., N]``.

    Args:
        order: int ``[S, K]``: the columns of x in the order of ``weight``'s rows, for each of the S fused parts (S = 1:
            for all of them); None if nothing was sorted.
        sizes: columns of each part.
    """
    if order is None:
        return x @ weight
    if len(order) == 1:
        return x[..., order[0]] @ weight
    return torch.cat([x[..., part] @ w for part, w in zip(order, weight.split(sizes, dim=1), strict=True)], dim=-1)
