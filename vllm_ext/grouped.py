"""All experts of a layer at once, a Triton kernel a projection (:mod:`qalora_plugin.kernels.triton.grouped`).

Nothing in it depends on which experts were chosen but the tensors that say so: CUDA graphs hold it. Not yet run on a
GPU: its kernels are tested under Triton's interpreter and compiled for NVIDIA's architectures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation

from qalora_plugin.core.delta import factored_offsets
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels import grouped
from vllm_ext.compat import Layer
from vllm_ext.linear import QALoraLinearMethod


class GroupedExperts:
    """The loaded weights of a layer's experts, ``w13`` (gate and up side by side) and ``w2``, each stacked."""

    def __init__(self, layer: nn.Module, methods: Mapping[str, Sequence[QALoraLinearMethod]]):
        self.w13, self.w2 = (_stacked(layer, name, methods[name]) for name in ("w13", "w2"))
        self.experts = len(methods["w2"])

    def __call__(
        self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, activation: MoEActivation, weights_on_input: bool
    ) -> Tensor:
        """``[T, hidden] → [T, hidden]``; weights and experts: ``[T, k]``."""
        rows, shares = x, topk_weights[..., None].float()
        if weights_on_input:
            rows = (x[:, None] * shares).flatten(0, 1).to(x.dtype)
        tiles = self._tiles(topk_ids)
        both = _multiply(rows, self.w13, tiles)
        h = both.new_empty(len(both), both.shape[1] // 2)
        apply_moe_activation(activation, h, both)
        y = _multiply(h, self.w2, tiles).unflatten(0, topk_ids.shape).float()
        return (y if weights_on_input else y * shares).sum(1).to(x.dtype)

    def _tiles(self, topk_ids: Tensor) -> Any:
        from qalora_plugin.kernels.triton.grouped import Tiles, block_of  # Triton is not everywhere

        if not topk_ids.is_cuda:
            return Tiles.of(topk_ids, self.experts)
        from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

        block = block_of(topk_ids.numel(), self.experts)
        slots, experts, used = moe_align_block_size(topk_ids, block, self.experts)
        return Tiles(slots, experts, used, block, topk_ids.numel())


def why_not(layer: Layer, methods: Mapping[str, Sequence[QALoraLinearMethod]]) -> str | None:
    """Why the experts that were loaded into ``layer`` run one by one; None: they run together.

    Raises:
        QALoraError: act-order over several ranks, or a damaged ``g_idx``.
    """
    if not grouped.takes(layer.w2_scales):
        return "the kernel for all experts is for NVIDIA GPUs"
    for name, parts in methods.items():
        if parts[0].forced_path is not None:
            return f"{parts[0].forced_path} was asked for"
        orders = [_order(layer, name, i, method) for i, method in enumerate(parts)]
        if any(order is not None and len(order) > 1 for order in orders):
            return "gate_proj and up_proj of an expert are in different act-orders"
    return None


def _order(layer: nn.Module, name: str, i: int, method: QALoraLinearMethod) -> Tensor | None:
    stored = getattr(layer, f"{name}_g_idx", None)
    return None if stored is None else method.group_order(stored.data[i])


def _stacked(layer: nn.Module, name: str, methods: Sequence[QALoraLinearMethod]) -> GroupwiseWeight:
    """The parameters of one projection as one weight, its offsets dense."""
    first = methods[0]

    def stored(part: str) -> Tensor | None:
        found = getattr(layer, f"{name}_{part}", None)
        return None if found is None else found.data

    for part in ("scales", "scales_delta", "offsets", "offsets_a", "offsets_b"):
        tensor = stored(part)
        if tensor is not None and not tensor.isfinite().all():
            expert = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0])
            raise QALoraError(
                f"{part} of expert {expert} hold NaN or Inf ({methods[expert].parts[0].name}, served in "
                f"{first.prefix}). The quantisation failed or the training diverged: make the base, or the merge, "
                "again."
            )
    offsets, a, b, g_idx = stored("offsets"), stored("offsets_a"), stored("offsets_b"), stored("g_idx")
    if a is not None and b is not None:
        columns = b.split(first.columns, dim=2)
        product = torch.cat([factored_offsets(a[:, part], b_part) for part, b_part in enumerate(columns)], dim=2)
        offsets = (product if offsets is None else product + offsets).to(b.dtype)
    orders = None if g_idx is None else g_idx[:, 0].contiguous()  # of gate and up the same (why_not)
    if orders is not None and bool((orders == first.in_order().to(orders.device)).all()):
        orders = None
    qweight, zeros, scales, change = (stored(part) for part in ("qweight", "qzeros", "scales", "scales_delta"))
    if scales is not None and change is not None:
        scales = scales.float() + change
    return GroupwiseWeight.of([qweight, zeros, scales, offsets, orders, None], first.bits, first.columns_of_group)


def _multiply(x: Tensor, weight: GroupwiseWeight, tiles: Any) -> Tensor:
    from qalora_plugin.kernels.triton import grouped as kernels

    return kernels.multiply(x, weight, weight.offsets, tiles)
