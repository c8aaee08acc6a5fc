"""Quantized experts in vLLM, loaded as its ``RoutedExperts`` loads them, against the reference."""

from types import SimpleNamespace

import pytest
import torch
from support.vllm_experts import EXPERTS, LEAVES, K, make_experts, make_layer, spec
from support.vllm_layers import TOLERANCE, linear_tensors
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.qalora import QALora
from qalora_plugin.kernels import grouped
from vllm_ext import moe
from vllm_ext.moe import QALoraMoEMethod

TOKENS = 9
pytestmark = pytest.mark.usefixtures("one_rank")


def routing():
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in range(TOKENS)])  # the last: idle
    return torch.randn(TOKENS, K, generator=generator), torch.rand(TOKENS, 2, generator=generator), ids


def defined(experts, x, shares, ids):
    fmt, rows = QALora({"checkpoint_format": "gptq"}), []
    dense = [
        {
            leaf: reference.dequantize(fmt.read(spec("x", tensors), lambda name, t=tensors: t[name.removeprefix("x.")]))
            for leaf, tensors in one.items()
        }
        for one in experts
    ]
    for token, chosen, weights in zip(x.double(), ids.tolist(), shares.double(), strict=True):
        parts = []
        for e, weight in zip(chosen, weights, strict=True):
            h = nn.functional.silu(token @ dense[e]["gate_proj"]) * (token @ dense[e]["up_proj"])
            parts.append(weight * (h @ dense[e]["down_proj"]))
        rows.append(sum(parts))
    return torch.stack(rows)


def apply(layer, x, shares, ids):
    return layer.quant_method.apply(layer, x, shares, ids)


@pytest.mark.parametrize(
    "compute", [(torch.bfloat16, None), (torch.bfloat16, "dense"), (torch.float32, "dense")], ids=str
)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
def test_experts_equal_the_reference(sym, act_order, compute):
    dtype, path = compute
    experts, (x, shares, ids) = make_experts(sym, 32, act_order), routing()
    layer = make_layer(experts, dtype, path)
    x = x.to(dtype)
    found, wanted = apply(layer, x, shares, ids), defined(experts, x, shares, ids)
    assert found.dtype == dtype
    assert (found - wanted).norm() <= 3 * TOLERANCE[dtype] * wanted.norm()  # three products, and an activation


@pytest.fixture
def together(monkeypatch):
    """All experts in one kernel, as on NVIDIA GPUs; interpreted, it runs in float32 and float16."""
    monkeypatch.setattr(grouped, "takes", lambda x: True)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [True, False])
def test_experts_together_equal_the_reference(together, sym, act_order, on_input):
    experts, (x, shares, ids) = make_experts(sym, 32), routing()
    if act_order:  # gate and up of an expert are quantized on the same inputs, in the same order
        for e, one in enumerate(experts):
            orders = {"gate_proj": e, "up_proj": e, "down_proj": 10 + e}
            for leaf, seed in orders.items():
                one[leaf] = linear_tensors(K, seed, sym, "gptq", 32, order_seed=seed)
                del one[leaf]["bias"]
    for dtype in (torch.float32, torch.float16):
        layer = make_layer(experts, dtype, None)
        assert layer.quantized_experts is None
        layer.apply_router_weight_on_input = on_input
        given = shares if not on_input else torch.ones_like(shares)
        found = apply(layer, x.to(dtype), given, ids)
        wanted = defined(experts, x.to(dtype), given, ids)
        assert found.dtype == dtype
        assert (found - wanted).norm() <= {torch.float32: 3e-6, torch.float16: 3e-3}[dtype] * wanted.norm()


def test_weights_on_the_input(together):
    """As Llama-4 has them: with one expert a token, what is weighted is x."""
    experts, (x, shares, ids) = make_experts(True, 32), routing()
    layer = make_layer(experts, torch.float32, None)
    layer.apply_router_weight_on_input = True
    found = apply(layer, x, shares[:, :1], ids[:, :1])
    wanted = defined(experts, x * shares[:, :1], torch.ones_like(shares[:, :1]), ids[:, :1])
    assert (found - wanted).norm() <= 3e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("path", "act_order", "reason"),
    [("dense", False, "dense was asked for"), (None, True, "in different act-orders"), (None, False, "for NVIDIA")],
)
def test_cuda_graphs_need_the_experts_together(monkeypatch, path, act_order, reason):
    if "NVIDIA" not in reason:
        monkeypatch.setattr(grouped, "takes", lambda x: True)
    create = QALoraMoEMethod.create_weights

    def created(self, *args, **kwargs):
        self.in_graphs = True
        create(self, *args, **kwargs)

    monkeypatch.setattr(QALoraMoEMethod, "create_weights", created)
    with pytest.raises(QALoraError, match=f"{reason}.*Serve with --enforce-eager"):
        make_layer(make_experts(True, 32, act_order), torch.float32, path)


def test_damaged_scales_are_refused(together):
    experts = make_experts(True, 32)
    experts[2]["up_proj"]["scales"][0, 0] = float("nan")
    with pytest.raises(QALoraError, match="scales of expert 2 hold NaN or Inf"):
        make_layer(experts, torch.float32, None)


def test_ranks_add_up():
    experts, (x, shares, ids) = make_experts(False, 32), routing()
    found = sum(apply(make_layer(experts, torch.float32, "dense", rank, 2), x, shares, ids) for rank in range(2))
    wanted = defined(experts, x, shares, ids)
    assert (found - wanted).norm() <= 3 * TOLERANCE[torch.float32] * wanted.norm()


@pytest.mark.parametrize("compute", [(torch.bfloat16, None), (torch.float32, "dense"), (torch.float32, None)], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_factored_offsets(compute, ranks, monkeypatch):
    """Of one layer: ranks that differ, an expert whose offsets are dense, one without."""
    (dtype, path), experts = compute, []
    monkeypatch.setattr(grouped, "takes", lambda x: dtype == torch.float32 and path is None)
    for e, of_leaves in enumerate([(2, 2, 2), (1, 2, 3), (0, 0, 0), (None, 2, None)]):
        one = {}
        for i, (leaf, rank) in enumerate(zip(LEAVES, of_leaves, strict=True)):
            stored = None if rank is None else torch.float16
            one[leaf] = linear_tensors(K, 7 * e + i, False, "gptq", 32, offset_dtype=stored, rank=rank or 0)
            del one[leaf]["bias"]
        experts.append(one)
    x, shares, ids = routing()
    ids[0, 0] = EXPERTS - 1
    x = x.to(dtype)
    wanted = defined(experts, x, shares, ids)
    found = sum(apply(make_layer(experts, dtype, path, rank, ranks), x, shares, ids).double() for rank in range(ranks))
    rounded = 2e-4 if path is None and dtype == torch.float32 else 0  # together, the product is kept in float16
    assert (found - wanted).norm() <= (3 * TOLERANCE[dtype] + rounded) * wanted.norm()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("compute", [(torch.bfloat16, None), (torch.float32, "dense"), (torch.float32, None)], ids=str)
def test_changed_scales(compute, ranks, monkeypatch):
    """Of two experts and, in one of these, of down_proj alone; the last way is all experts together."""
    dtype, path = compute
    monkeypatch.setattr(grouped, "takes", lambda x: dtype == torch.float32 and path is None)
    experts, (x, shares, ids) = make_experts(False, 32), routing()
    for e, leaf in ((0, "gate_proj"), (0, "up_proj"), (0, "down_proj"), (1, "down_proj")):
        scales = experts[e][leaf]["scales"]
        generator = torch.Generator().manual_seed(e)
        experts[e][leaf]["scales_delta"] = (0.2 * scales.float() * torch.rand(scales.shape, generator=generator)).half()
    x = x.to(dtype)
    found = sum(apply(make_layer(experts, dtype, path, rank, ranks), x, shares, ids).double() for rank in range(ranks))
    wanted = defined(experts, x, shares, ids)
    assert (found - wanted).norm() <= 3 * TOLERANCE[dtype] * wanted.norm()


def test_a_process_may_hold_several_models(monkeypatch):
    """Their layers have the same names: which one runs is known to vLLM's context."""
    x, shares, ids = routing()
    first, second = make_experts(True, 32), make_experts(False, 32)
    layers = [make_layer(experts, torch.float32, "dense") for experts in (first, second)]
    assert layers[0].layer_name == layers[1].layer_name
    for layer, experts in zip(layers, (first, second), strict=True):
        wanted = defined(experts, x, shares, ids)
        runner = SimpleNamespace(no_compile_layers={layer.layer_name: SimpleNamespace(routed_experts=layer)})
        monkeypatch.setattr(moe, "get_forward_context", lambda runner=runner: runner)
        for found in (apply(layer, x, shares, ids), torch.ops.qalora.experts(x, shares, ids, layer.layer_name)):
            assert (found - wanted).norm() <= 3 * TOLERANCE[torch.float32] * wanted.norm()


def test_a_compiled_graph_calls_the_layer_by_its_name(monkeypatch):
    x, shares, ids = routing()
    experts = make_experts(True, 32)
    layer = make_layer(experts, torch.float32, "dense")
    asked = []
    layers = {layer.layer_name: SimpleNamespace(routed_experts=layer)}
    context = SimpleNamespace(no_compile_layers=layers)
    monkeypatch.setattr(moe, "get_forward_context", lambda: asked.append(1) or context)
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x, shares, ids), backend="eager", fullgraph=True)
    wanted = defined(experts, x, shares, ids)
    assert (compiled(x) - wanted).norm() <= 3 * TOLERANCE[torch.float32] * wanted.norm()
    assert asked


def test_graphs_hold_the_first_weights(together):
    layer = make_layer(make_experts(True, 32), torch.float32, None)
    layer.quant_method.in_graphs = True
    with pytest.raises(QALoraError, match="cannot be reloaded into CUDA graphs"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_rank_cannot_split_a_group():
    with pytest.raises(QALoraError, match="a group cannot be split"):
        make_layer(make_experts(False, 128), torch.float32, "dense", 0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_parallel_config": SimpleNamespace(use_ep=True)}, "cannot be spread over ranks"),
        ({"is_lora_enabled": True}, "Serve without --enable-lora"),
        ({"has_bias": True}, r"compute more than down\(act\(gate\)·up\)"),
        ({"activation": MoEActivation.SWIGLUOAI}, "swigluoai"),
        ({"num_experts": 3}, r"experts.3.gate_proj is no expert that experts has \(3 of them"),
        ({"num_experts": 5}, "expert 4 lacks a quantized w1"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(change, message):
    with pytest.raises(QALoraError, match=message):
        make_layer(make_experts(True, 32), torch.bfloat16, None, **change)


def test_experts_quantized_differently_are_refused():
    experts = make_experts(True, 32)
    experts[2] = make_experts(True, 64)[2]
    with pytest.raises(QALoraError, match=r"quantized differently \(\[\(4, 32\), \(4, 64\)\]"):
        make_layer(experts, torch.bfloat16, None)
