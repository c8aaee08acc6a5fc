"""Quantized experts as a checkpoint stores them, and vLLM's layer of them, loaded as its ``RoutedExperts`` loads it."""

from types import SimpleNamespace

import torch
from support.vllm_layers import linear_tensors
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.qalora import QALora
from vllm_ext.moe import QALoraMoEMethod

EXPERTS, K = 4, 256  # K is what linear_tensors makes
LEAVES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def make_experts(sym, group_size, act_order=False):
    """Stored tensors by expert and leaf; ``down_proj`` is K × K here: inner size and hidden size are both K."""
    experts = []
    for e in range(EXPERTS):
        orders = {leaf: 10 * e + i if act_order else None for i, leaf in enumerate(LEAVES)}
        made = {
            leaf: linear_tensors(K, 7 * e + i, sym, "gptq", group_size, order_seed=orders[leaf])
            for i, leaf in enumerate(LEAVES)
        }
        experts.append({leaf: {part: t for part, t in one.items() if part != "bias"} for leaf, one in made.items()})
    return experts


def spec(name, tensors, bits=4):
    groups, n = tensors["scales"].shape
    has_offsets, rank = {"offsets", "offsets_a"} & tensors.keys(), tensors.get("offsets_a", torch.empty(0, 0)).shape[1]
    dtype = "float16" if has_offsets else None
    return GroupwiseSpec(
        name, K, n, bits, K // groups, offset_dtype=dtype, has_g_idx="g_idx" in tensors, offset_rank=rank,
        scales_delta_dtype="float16" if "scales_delta" in tensors else None,
    )  # fmt: skip


def make_layer(experts, dtype, path, rank=0, ranks=1, stored=None, **changes):
    """``experts``: what is loaded; ``stored``: what the layer is made for, if that is another thing."""
    settings = SimpleNamespace(
        num_experts=EXPERTS, moe_parallel_config=SimpleNamespace(use_ep=False), is_act_and_mul=True, has_bias=False,
        activation=MoEActivation.SILU, tp_size=ranks, tp_rank=rank,
    )  # fmt: skip
    vars(settings).update(changes)
    modules = {
        f"{e}.{leaf}": spec(f"experts.{e}.{leaf}", tensors)
        for e, one in enumerate(stored or experts)
        for leaf, tensors in one.items()
    }
    fmt = QALora({"checkpoint_format": "gptq"})
    method, layer = QALoraMoEMethod(settings, "experts", modules, fmt, path, None, True), nn.Module()
    layer.layer_name, layer.activation, layer.apply_router_weight_on_input = (
        f"experts {rank}",
        MoEActivation.SILU,
        False,
    )
    layer.quant_method = method
    method.create_weights(layer, EXPERTS, K, K // ranks, dtype)
    for e, one in enumerate(experts):
        for leaf, tensors in one.items():
            shard = LEAVES[leaf]
            for part, tensor in tensors.items():
                parameter = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{part}")
                parameter.weight_loader(
                    param=parameter, loaded_weight=tensor, weight_name=part, shard_id=shard, expert_id=e,
                    return_success=True,
                )  # fmt: skip
    method.process_weights_after_loading(layer)
    assert not list(layer.parameters())  # every expert's are its own now
    return layer
