"""Quantized experts in vLLM, loaded as its ``RoutedExperts`` loads them, against the reference."""

from types import SimpleNamespace

import pytest
import torch
from support.vllm_layers import TOLERANCE, linear_tensors
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.parameter import BasevLLMParameter

from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.qalora import QALora
from qalora_plugin.kernels import grouped
from vllm_ext import moe
from vllm_ext.linear import QALoraLinearMethod
from vllm_ext.moe import QALoraMoEMethod

EXPERTS, K, TOKENS = 4, 256, 9  # K is what linear_tensors makes
LEAVES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
pytestmark = pytest.mark.usefixtures("one_rank")


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


@pytest.mark.parametrize("leaf", list(LEAVES))
def test_an_expert_without_what_the_layer_was_made_for_is_refused(leaf):
    """As another merge may be that ``reload_weights`` brings."""
    stored, loaded = make_experts(True, 32), make_experts(True, 32)
    del loaded[1][leaf]["offsets"]
    with pytest.raises(QALoraError, match=rf"lack experts\.1\.{leaf}\.offsets \(served as experts\)"):
        make_layer(loaded, torch.float32, "dense", stored=stored)


@pytest.mark.parametrize("leaf", list(LEAVES))
def test_an_expert_with_more_than_the_layer_was_made_for_is_refused(leaf):
    """What it brought was dropped, beside experts that were served with theirs."""
    stored, loaded = make_experts(True, 32), make_experts(True, 32)
    del stored[1][leaf]["offsets"]
    with pytest.raises(QALoraError, match=rf"hold offsets of experts\.1\.{leaf} \(served as experts\)"):
        make_layer(loaded, torch.float32, "dense", stored=stored)


@pytest.mark.parametrize("group_size", [32, K])
def test_vllms_kernels_get_parameters_of_its_own_kinds(monkeypatch, group_size):
    """Machete, Marlin and others assert it; those of a CPU do not."""
    given = []
    whole = QALoraLinearMethod.process_weights_after_loading
    monkeypatch.setattr(
        QALoraLinearMethod,
        "process_weights_after_loading",
        lambda method, linear: given.append(dict(linear.named_parameters())) or whole(method, linear),
    )
    make_layer(make_experts(False, group_size), torch.float32, "dense")
    assert len(given) == 2 * EXPERTS
    for parameters in given:
        assert all(isinstance(parameter, BasevLLMParameter) for parameter in parameters.values())
        qweight, scales = parameters["qweight"], parameters["scales"]
        assert (qweight.input_dim, qweight.output_dim, qweight.packed_dim, qweight.packed_factor) == (0, 1, 0, 8)
        assert scales.output_dim == 1


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
