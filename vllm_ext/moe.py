"""The experts of a merged mixture-of-experts checkpoint in vLLM.

vLLM's fused kernels take integer zero-points and have no place for offsets. On NVIDIA GPUs a kernel of our own takes
all experts at once (:mod:`.grouped`). Elsewhere the layer runs expert by expert, those alone that tokens are routed to,
each two linears over the kernels that all linears run on (``kernels.select``), offsets and asymmetric zeros included.
That reads on the CPU which experts were chosen, which a CUDA graph cannot hold: where a GPU has to do it, it needs
``--enforce-eager``. torch.compile sees one op.

Written against ``RoutedExperts`` of vLLM 0.32 (``model_executor/layers/fused_moe/routed_experts.py``).
"""

from collections.abc import Callable
from functools import reduce
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.core.words import codes_per_period, words_per_period
from qalora_plugin.formats.gptq import Gptq
from vllm_ext import grouped
from vllm_ext.compat import Layer
from vllm_ext.experts import by_expert
from vllm_ext.factors import require_rank
from vllm_ext.linear import QALoraLinearMethod
from vllm_ext.ops import define

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_PARTS = ("qweight", "qzeros", "scales", "scales_delta", "offsets", "offsets_a", "offsets_b", "g_idx")


class QALoraMoEMethod(FusedMoEMethodBase):
    """All experts of one layer.

    Args:
        prefix: name of the layer in the vLLM model, for messages.
        modules: the checkpoint's experts by their names in that layer, ``0.gate_proj`` …
        fmt, forced_path, timed_path, symmetric: as :class:`~vllm_ext.linear.QALoraLinearMethod` takes them.

    Raises:
        QALoraError: experts are missing or quantized differently, or vLLM is to spread them over ranks.
    """

    def __init__(
        self,
        moe: FusedMoEConfig,
        prefix: str,
        modules: dict[str, GroupwiseSpec],
        fmt: Gptq,
        forced_path: str | None,
        timed_path: str | None,
        symmetric: bool,
    ):
        super().__init__(moe)
        self.prefix, self.format = prefix, fmt
        specs = by_expert(modules, moe.num_experts, prefix)
        if getattr(moe, "is_lora_enabled", False):
            raise QALoraError(f"{prefix}: no LoRA can be served beside quantized experts. Serve without --enable-lora; "
                              "merge the adapter (`qalora merge`).")  # fmt: skip
        if moe.moe_parallel_config.use_ep:
            raise QALoraError(f"{prefix}: experts of a qalora checkpoint cannot be spread over ranks. Serve without "
                              "--enable-expert-parallel.")  # fmt: skip
        if not moe.is_act_and_mul or moe.has_bias or moe.activation.value not in _ACTIVATIONS:
            raise QALoraError(
                f"{prefix}: its experts compute more than down(act(gate)·up), or another activation "
                f"({moe.activation.value}) than {', '.join(_ACTIVATIONS)}. Serve the merged checkpoint with "
                "transformers."
            )
        on_gpu = current_platform.is_cuda_alike()
        self.in_graphs = on_gpu and not get_current_vllm_config().model_config.enforce_eager

        def method(parts: list[GroupwiseSpec]) -> QALoraLinearMethod:
            return QALoraLinearMethod(prefix, parts, fmt, forced_path, symmetric, timed_path)

        self.methods = {"w13": [method([one["w1"], one["w3"]]) for one in specs],
                        "w2": [method([one["w2"]]) for one in specs]}  # fmt: skip

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register ``w13_…`` and ``w2_…``, stacked by expert, as the checkpoint stores them, for this rank.

        Raises:
            QALoraError: the layer does not fit the checkpoint, or its share would split a group or a packed word.
        """
        inner, ranks = intermediate_size_per_partition, self.moe.tp_size
        sizes = {"w13": (hidden_size, [inner, inner]), "w2": (inner, [hidden_size])}
        full = {"w13": (hidden_size, 2 * inner * ranks), "w2": (inner * ranks, hidden_size)}
        for name, (k, outputs) in sizes.items():
            for method in self.methods[name]:
                method.take_share(full[name], k, outputs, params_dtype, self.moe.tp_rank)
            first, parts = self.methods[name][0], self.methods[name]
            n, groups, bits = sum(outputs), k // first.columns_of_group, first.bits
            offsets = [one.offset_dtype for one in parts if one.offset_dtype is not None]
            changes = [one.scales_delta_dtype for one in parts if one.scales_delta_dtype is not None]
            factors = [one.factors for one in parts if one.factors is not None]
            rank = max((one.rank for one in factors), default=0)
            shapes = {
                "qweight": ((k // codes_per_period(bits) * words_per_period(bits), n), torch.int32),
                "qzeros": ((groups, n), torch.uint8),
                "scales": ((groups, n), _widest([one.scale_dtype for one in parts])),
                "scales_delta": ((groups, n), _widest(changes)),
                "offsets": ((groups, n), _widest(offsets)),
                "offsets_a": ((len(first.parts), groups, rank), torch.float32 if factors else None),
                "offsets_b": ((rank, n), _widest([one.dtype for one in factors])),
                "g_idx": ((len(outputs), k), torch.int32 if any(one.has_g_idx for one in parts) else None),
            }
            for part, (shape, dtype) in shapes.items():
                if dtype is None:
                    continue
                data = torch.zeros(num_experts, *shape, dtype=dtype)
                if part == "qzeros":
                    data.fill_(1 << (bits - 1))
                if part == "g_idx":
                    data += first.in_order()
                parameter = nn.Parameter(data, requires_grad=False)
                parameter.weight_loader = self._loader(name, part)  # type: ignore[attr-defined]  # where vLLM looks
                layer.register_parameter(f"{name}_{part}", parameter)

    def _loader(self, name: str, part: str) -> Callable:
        """As vLLM calls it, by keyword: one tensor of one expert, of which this rank takes its share."""
        rank = self.moe.tp_rank

        def load(
            param: nn.Parameter,
            loaded_weight: Tensor,
            weight_name: str = "",
            shard_id: str = "",
            expert_id: int = 0,
            return_success: bool = False,
        ) -> bool | None:
            target, second = param.data[expert_id], shard_id == "w3"
            method = self.methods[name][expert_id]
            method.loads.note(part, [int(second)])
            if part == "qzeros":
                loaded_weight = self.format.true_zeros(loaded_weight, method.bits)
            if part == "offsets_a":
                row, rank_of = target[int(second)], loaded_weight.shape[1]
                require_rank(rank_of, [one.offset_rank for one in method.parts], [int(second)])
                row[:, rank_of:].zero_()  # where vLLM reloads it is uninitialised
                start = rank * len(row) if len(loaded_weight) > len(row) else 0
                row[:, :rank_of].copy_(loaded_weight[start : start + len(row)])
            elif part == "offsets_b":
                n = target.shape[1] // (2 if name == "w13" else 1)
                start = rank * n if name == "w13" else 0
                require_rank(len(loaded_weight), [one.offset_rank for one in method.parts], [int(second)])
                columns = target[:, n * second : n * (second + 1)]
                columns[len(loaded_weight) :].zero_()
                columns[: len(loaded_weight)].copy_(loaded_weight[:, start : start + n])
            elif part == "g_idx":
                start = rank * target.shape[1] if loaded_weight.shape[0] > target.shape[1] else 0
                target[int(second)].copy_(loaded_weight[start : start + target.shape[1]])
            elif name == "w13":
                n = target.shape[1] // 2
                target[:, n * second : n * (second + 1)].copy_(loaded_weight[:, rank * n : (rank + 1) * n])
            else:
                start = rank * len(target) if len(loaded_weight) > len(target) else 0
                target.copy_(loaded_weight[start : start + len(target)])
            return True if return_success else None

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Take what was loaded, stacked, as one weight a projection, or give every expert's kernel its own.

        Raises:
            QALoraError: as for linears; or a GPU would have to run the experts one by one in CUDA graphs.
        """
        if self.in_graphs and getattr(layer, "grouped_experts", None) is not None:
            raise QALoraError(
                f"{self.prefix}: quantized experts cannot be reloaded into CUDA graphs. Start the server anew, or with "
                "--enforce-eager."
            )
        layer.quantized_experts = layer.grouped_experts = None
        for name, methods in self.methods.items():
            for i, method in enumerate(methods):
                stacked = {part: getattr(layer, f"{name}_{part}", None) for part in _PARTS}
                mine = {part: None if whole is None else whole.data[i] for part, whole in stacked.items()}
                first = method.kind is None
                method.loads.complete(SimpleNamespace(**mine), method.parts, method.columns, method.in_order(), first)
        why_not = grouped.why_not(layer, self.methods)
        if why_not is None:
            layer.grouped_experts = grouped.GroupedExperts(layer, self.methods)
        else:
            if self.in_graphs:
                raise QALoraError(
                    f"{self.prefix} has quantized experts that run one by one ({why_not}): a CUDA graph cannot hold "
                    "that. Serve with --enforce-eager."
                )
            layer.quantized_experts = {
                name: [self._expert(layer, name, i) for i in range(len(methods))]
                for name, methods in self.methods.items()
            }
        for name in self.methods:
            for part in _PARTS:
                if getattr(layer, f"{name}_{part}", None) is not None:
                    layer.register_parameter(f"{name}_{part}", None)

    def _expert(self, layer: nn.Module, name: str, i: int) -> nn.Module:
        """The linear ``name`` of one expert, as :class:`QALoraLinearMethod` applies it."""
        method = self.methods[name][i]
        linear: Layer = nn.Module()
        parts = {
            "qweight": True,
            "qzeros": True,
            "scales": True,
            "scales_delta": method.scales_delta_dtype,
            "offsets": method.offset_dtype,
            "offsets_a": method.factors,
            "offsets_b": method.factors,
            "g_idx": method.has_g_idx,
        }
        for part, there in parts.items():
            if there:
                data = getattr(layer, f"{name}_{part}").data[i].contiguous().clone()
                linear.register_parameter(part, method.parameter(part, data, default_weight_loader))
        linear.bias = None
        method.process_weights_after_loading(linear)
        return linear

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None  # for vLLM's kernels, of which none runs

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: nn.Module | None = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """``[T, hidden] → [T, hidden]``, this rank's part of the sum. Shared experts are vLLM's to run."""
        if torch.compiler.is_compiling():
            return torch.ops.qalora.experts(x, topk_weights, topk_ids, layer.layer_name)
        return self.run(layer, x, topk_weights, topk_ids)

    def run(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        on_input = layer.apply_router_weight_on_input
        if layer.grouped_experts is not None:
            return layer.grouped_experts(x, topk_weights, topk_ids, layer.activation, on_input)
        k, chosen = topk_ids.shape[-1], topk_ids.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=self.moe.num_experts).tolist()
        rows, shares = x[order // k], topk_weights.flatten()[order, None]
        if on_input:
            rows, shares = (rows * shares).to(x.dtype), torch.ones_like(shares)
        y = rows.new_empty(rows.shape, dtype=torch.float32)
        w13, w2 = layer.quantized_experts["w13"], layer.quantized_experts["w2"]
        start = 0
        for i, count in enumerate(counts):
            if count:
                part = slice(start, start + count)
                both = self.methods["w13"][i].apply(w13[i], rows[part])
                h = both.new_empty(count, both.shape[1] // 2)
                apply_moe_activation(layer.activation, h, both)
                y[part] = self.methods["w2"][i].apply(w2[i], h).float() * shares[part]
                start += count
        return y[order.argsort()].unflatten(0, (-1, k)).sum(1).to(x.dtype)


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    """A compiled graph knows a layer by its name: that of the model which runs, for several may be in a process."""
    layer: Any = get_forward_context().no_compile_layers[layer_name].routed_experts
    return layer.quant_method.run(layer, x, topk_weights, topk_ids)


def _experts_fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(x)


define("experts", _experts, _experts_fake)


def _widest(dtypes: list[torch.dtype]) -> torch.dtype | None:
    return reduce(torch.promote_types, dtypes) if dtypes else None
