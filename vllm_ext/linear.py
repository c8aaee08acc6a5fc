"""The linear of a merged checkpoint in vLLM: ``y = x·[scales·(q − zeros)] + P(x)·offsets + bias``, the scales with what
training changed them by: ``scales + scales_delta`` in float32, then in the kernel's own dtype as any scales.

The first term is a kernel of vLLM's, on the base's own INT weights; the second is ``ops.add_offsets``, [G, N] wide, or
``ops.add_factored`` (:mod:`.factors`), or part of the kernel's zero-points; without a kernel, ``dense`` computes both
in one matmul (``kernels.select`` chooses). Whether a layer is symmetric or in act-order is read off its tensors once
they are loaded, since configs are known to be wrong.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import BasevLLMParameter

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.formats.gptq import Gptq
from qalora_plugin.kernels.hardware import gemm_dtype
from vllm_ext.compat import Layer, loads_from_files
from vllm_ext.factors import OffsetFactors, multiplied, take
from vllm_ext.kernels.dense import dense_weight, matmul
from vllm_ext.kernels.select import FUSED, SEPARATE, LayerKind, choose_path
from vllm_ext.kernels.vllm import hand_over, moved_zeros
from vllm_ext.loaders import (
    Loads,
    by_output,
    load_by_part,
    parameter_of,
    require_finite,
    sort_rows,
    vocabulary_loader,
    zeros_loader,
)
from vllm_ext.ops import add_factored, add_offsets, prepare, prepare_factors


@register_weight_loader_v2_supported_method
class QALoraLinearMethod(LinearMethodBase):
    """One linear of the model; vLLM may have fused several of the checkpoint's into it (q, k, v).

    Args:
        prefix: name of the layer in the vLLM model, for messages.
        parts: the checkpoint's linears behind it, in order.
        fmt: how the checkpoint stores them.
        forced_path: one of ``select.PATHS``, or None to choose.
        timed_path: the faster one where both are possible (``select.timed_path``).
        guessed: ``parts`` are those of a layer that is called alike.
        symmetric: what the config says. Only weights that are not loaded (``--load-format dummy``) go by it.
    """

    kernel: Any  # one of vLLM's, or what stands in for one; None for dense

    def __init__(
        self,
        prefix: str,
        parts: list[GroupwiseSpec],
        fmt: Gptq,
        forced_path: str | None = None,
        symmetric: bool = True,
        timed_path: str | None = None,
        guessed: bool = False,
    ):
        self.prefix, self.parts, self.format = prefix, parts, fmt
        self.forced_path, self.symmetric, self.timed_path = forced_path, symmetric, timed_path
        self.kind: tuple[LayerKind, bool] | None = None
        self.loads = Loads(prefix, guessed)
        kinds = {(part.bits, part.in_features, part.group_size) for part in parts}
        if len(kinds) > 1:
            listed = ", ".join(f"{part.name}: {part.bits} bits, group size {part.group_size}" for part in parts)
            raise QALoraError(
                f"vLLM runs these linears as one layer, so they must be quantised alike: {listed}. "
                "Quantise the base again with equal settings for them."
            )
        ((self.bits, self.in_features, self.group_size),) = kinds
        self.scale_dtype = reduce(torch.promote_types, [getattr(torch, part.scale_dtype) for part in parts])
        dense = [getattr(torch, part.offset_dtype) for part in parts if part.offset_dtype and not part.offset_rank]
        self.offset_dtype = reduce(torch.promote_types, dense) if dense else None
        self.factors = OffsetFactors.of(parts)
        deltas = [getattr(torch, part.scales_delta_dtype) for part in parts if part.scales_delta_dtype is not None]
        self.scales_delta_dtype = reduce(torch.promote_types, deltas) if deltas else None
        self.has_g_idx = any(part.has_g_idx for part in parts)

    def create_weights(
        self,
        layer: Layer,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register what the checkpoint stores, in the checkpoint's dtypes, for this tensor-parallel rank.

        Raises:
            QALoraError: the layer does not fit the checkpoint, or its share would split a group or a packed word.
        """
        is_split = input_size_per_partition < input_size
        self.take_share(
            (input_size, output_size), input_size_per_partition, output_partition_sizes, params_dtype,
            layer.tp_rank if is_split else 0,
        )  # fmt: skip
        k, n = self.shape
        groups = k // self.columns_of_group
        is_head = isinstance(layer, ParallelLMHead)
        self.loads.expected = loads_from_files() and not is_head  # a draft's head may be its target's
        loader = vocabulary_loader(layer) if is_head else extra_weight_attrs["weight_loader"]

        def noted(name: str, load: Callable = loader) -> Callable:
            return self.loads.noted(name, load, len(output_partition_sizes))

        qweight = torch.empty(k * self.bits // 32, n, dtype=torch.int32)
        layer.qweight = self.parameter("qweight", qweight, noted("qweight"))

        def register(name: str, dtype: torch.dtype, load: Callable = loader) -> None:
            data = torch.empty(groups, n, dtype=dtype)
            layer.register_parameter(name, self.parameter(name, data, noted(name, load)))

        register("qzeros", torch.uint8, zeros_loader(loader, self.bits, self.format))
        layer.qzeros.dummy_weight_value = (1 << (self.bits - 1)) if self.symmetric else 1
        register("scales", self.scale_dtype)
        if self.offset_dtype is not None:
            register("offsets", self.offset_dtype)
        if self.factors is not None:
            self.factors.register(layer, self.parts, groups, n, loader, noted)
        if self.scales_delta_dtype is not None:
            register("scales_delta", self.scales_delta_dtype)
        if self.has_g_idx:
            g_idx = self.in_order().repeat(len(output_partition_sizes), 1)  # stays so with --load-format dummy
            layer.register_parameter("g_idx", self.parameter("g_idx", g_idx, noted("g_idx", load_by_part)))

    def parameter(self, name: str, data: Tensor, load: Callable) -> BasevLLMParameter:
        return parameter_of(name, data, load, self.bits, self.one_group)

    def take_share(
        self, full_shape: tuple[int, int], k: int, outputs: list[int], act_dtype: torch.dtype, rank: int
    ) -> None:
        """Be this rank's part of a layer ``(K, N)``: k input columns, and as many outputs of each fused part.

        Raises:
            QALoraError: the layer does not fit the checkpoint, or its share would split a group or a packed word.
        """
        self.shape, self.full_shape = (k, sum(outputs)), full_shape
        self.output_sizes, self.act_dtype = outputs, act_dtype
        if 1 < len(self.parts) < len(outputs):
            self.parts = by_output(self.parts, outputs, Fraction(full_shape[1], sum(outputs)), self.prefix)
        # One group over all of K: its scale, zero and offset hold for every rank's share of K, so each rank keeps them.
        self.one_group = self.group_size == self.in_features
        self.columns_of_group = k if self.one_group else self.group_size
        self._check_sizes()
        self.first_group = rank * (k // self.columns_of_group) if k < full_shape[0] and not self.one_group else 0

    def _check_sizes(self) -> None:
        k, full_k = self.shape[0], self.full_shape[0]
        if full_k != self.in_features:
            raise QALoraError(
                f"{self.prefix} has in_features {self.in_features} in the checkpoint, but {full_k} by config.json. "
                "They do not belong together: merge or download the checkpoint again."
            )
        if k % self.columns_of_group:
            raise QALoraError(
                f"{self.prefix}: tensor parallelism gives each rank {k} of {full_k} input columns, which is not a "
                f"multiple of the group size {self.group_size}: a group cannot be split. Use a tensor-parallel size "
                f"that divides {full_k // self.group_size}, or quantise the base with a group size that divides {k}."
            )
        period = codes_per_period(self.bits)
        if k % period:
            raise QALoraError(
                f"{self.prefix}: tensor parallelism gives each rank {k} of {full_k} input columns, but {self.bits}-bit "
                f"codes are packed in runs of {period}. Use a smaller tensor-parallel size."
            )

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Sort act-order away, choose the path, hand the kernel its weights. Once, and again after ``reload_weights``.

        Raises:
            QALoraError: act-order across tensor-parallel ranks, a damaged ``g_idx``, no path, or reloaded weights of
                another kind.
        """
        if layer.qweight.is_meta:  # a head that a pooling model does not use
            return
        self.loads.complete(layer, self.parts, self.columns, self.in_order(), first=self.kind is None)
        order = self.group_order(layer.g_idx.data) if self.has_g_idx else None
        if order is not None:
            layer.qweight.data = sort_rows(layer.qweight.data, self.bits, order, self.output_sizes)
        require_finite(layer, self.parts, self.columns, self.prefix)
        if self.scales_delta_dtype is not None:
            layer.scales.data = layer.scales.data.float() + layer.scales_delta.data
            layer.register_parameter("scales_delta", None)
        layer.register_buffer("input_order", order)  # persistent, or vLLM's reloading keeps the first weights'
        if self.has_g_idx:
            del layer.g_idx
        offsets = None if self.offset_dtype is None else layer.offsets.data
        layer.register_parameter("offsets", None)
        factors = None if self.factors is None else take(layer, self.parts, self.columns)

        zeros = layer.qzeros.data  # unpacked while they were loaded
        layer.register_parameter("qzeros", None)
        kind = LayerKind(
            prefix=self.prefix,
            bits=self.bits,
            symmetric=bool((zeros == 1 << (self.bits - 1)).all()),
            group_size=-1 if self.one_group else self.group_size,
            act_dtype=self.act_dtype,
            full_shape=self.full_shape,
            shape=self.shape,
            has_offsets=offsets is not None or factors is not None,
            sortable=order is None or len(order) == 1,
        )
        self._require_same_kind(kind, order is not None)
        path, self.kernel = choose_path(kind, self.forced_path, self.timed_path)
        moved = path == SEPARATE and not (kind.symmetric or self.kernel.config.zero_points)
        if factors is not None:
            alone = path == SEPARATE and offsets is None and not moved
            offsets = self._held(layer, factors) if alone else multiplied(factors, offsets)
        if path == FUSED:
            shifts = torch.zeros_like(layer.scales.data) if offsets is None else offsets
            self.kernel.hand_over(layer, zeros, self.bits, shifts)
            return
        if self.kernel is None:
            self.gemm_dtype = gemm_dtype(self.act_dtype, zeros.device)
            layer.zeros = nn.Parameter(zeros, requires_grad=False)
        else:
            if moved:
                shifts = moved_zeros(layer.scales.data.to(self.act_dtype), zeros, self.bits)  # the kernel's scales
                offsets = shifts if offsets is None else shifts + offsets
            hand_over(self.kernel, layer, zeros, self.bits)
            offsets = None if offsets is None else prepare(offsets, self.act_dtype, self.columns_of_group)
        if offsets is not None:
            layer.offsets = nn.Parameter(offsets, requires_grad=False)

    def _held(self, layer: Layer, factors: tuple[Tensor, Tensor]) -> Tensor | None:
        """Keep the factors in the layer, or return their product ``[G, N]`` where that is no larger."""
        if held := prepare_factors(*factors, self.act_dtype):
            layer.offsets_a, layer.offsets_b = (nn.Parameter(one, requires_grad=False) for one in held)
            return None
        return multiplied(factors).to(factors[1].dtype)

    @property
    def columns(self) -> list[int]:
        """Of N, for each of the checkpoint's linears."""
        return self.output_sizes if len(self.parts) > 1 else [sum(self.output_sizes)]

    def in_order(self) -> Tensor:
        """``g_idx`` [K] of this rank's share without act-order."""
        return torch.arange(self.shape[0], dtype=torch.int32) // self.columns_of_group + self.first_group

    def _require_same_kind(self, kind: LayerKind, act_order: bool) -> None:
        """Compiled graphs, and the tensors that vLLM reloads into, belong to the first weights' kind."""
        found = (kind, act_order)
        if self.kind not in (None, found):
            names = [f"{one}{', act-order' if ordered else ''}" for one, ordered in (self.kind, found)]
            raise QALoraError(
                f"{self.prefix}: the reloaded weights are of another kind ({names[1]}) than those served so far "
                f"({names[0]}). Start the server anew."
            )
        self.kind = found

    def group_order(self, g_idx: Tensor) -> Tensor | None:
        """Columns of x sorted by group, ``[S, K]``: S = 1 if the fused parts agree. None if they are in order."""
        in_order = self.in_order().to(g_idx.device)
        order = torch.argsort(g_idx, dim=1, stable=True)
        if not (g_idx.gather(1, order) == in_order).all():
            if self.shape[0] < self.in_features:
                raise QALoraError(
                    f"{self.prefix} was quantised with act-order (desc_act), which scatters the columns of a group "
                    "over all tensor-parallel ranks. Serve with --tensor-parallel-size 1, or quantise the base with "
                    "desc_act=False."
                )
            raise QALoraError(
                f"{self.prefix}: g_idx does not put exactly {self.columns_of_group} columns into each group. The "
                "checkpoint is damaged: download or merge it again."
            )
        if (g_idx == in_order).all():
            return None
        return order[:1] if (order == order[0]).all() else order

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., K] → [..., N]``."""
        if self.kernel is None:
            dtype = self.gemm_dtype
            weight = dense_weight(layer.qweight, layer.zeros, layer.scales, layer.offsets, self.bits, dtype)
            y = matmul(x.to(dtype), weight, layer.input_order, self.output_sizes).to(x.dtype)
            return y if bias is None else y + bias
        if layer.input_order is not None:
            x = x[..., layer.input_order[0]]
        x = x if x.stride(-1) == 1 else x.contiguous()  # vLLM's CPU kernel misreads other layouts
        y = self.kernel.apply_weights(layer, x, bias)
        if layer.offsets is not None:
            add_offsets(y, x, layer.offsets, self.columns_of_group)
        elif self.factors is not None and layer.offsets_a is not None:
            add_factored(y, x, layer.offsets_a, layer.offsets_b, self.columns_of_group)
        return y
