"""Stacked experts against the definition, in float64, expert by expert."""

from dataclasses import replace

import pytest
import torch
from support.layers import assert_close, make_layer, spec_of
from support.stacked import EXPERTS, HIDDEN, INNER, RANK, SCALING, TOKENS, make_linear, routing
from torch.nn.functional import silu

from qalora_plugin.core import reference
from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.kernels import grouped
from qalora_plugin.layers.experts import QuantExpertLinear, QuantExperts


def dense(weights):
    return torch.stack([reference.dequantize(weight) for weight in weights])


def biases(layer):
    return torch.zeros(EXPERTS, layer.out_features).double() if layer.bias is None else layer.bias.double()


KINDS = [{}, {"act_order": True}, {"offsets": True}, {"bias": True}, {"bits": 3}, {"bits": 8}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_expert_is_the_definition(kind):
    layer, weights = make_linear(HIDDEN, INNER, 0, **kind)
    assert (layer.bias is not None) == ("bias" in kind)
    counts = [3, 0, 4, 1, 0]
    x = torch.randn(sum(counts), HIDDEN)
    every = zip(x.split(counts), dense(weights), biases(layer), strict=True)
    wanted = torch.cat([part.double() @ w + bias for part, w, bias in every])
    assert_close(layer(x, counts), wanted, 1e-6)
    assert_close(layer.dense_weight(), dense(weights), 1e-6)
    assert layer(x[:0], [0] * EXPERTS).shape == (0, INNER)


def test_offsets_of_every_form_in_one_layer():
    """Factored in two ranks, dense, and none."""
    weights = [make_layer(HIDDEN, INNER, 4, 32, seed=i, offsets=True).quantized for i in range(EXPERTS)]
    factors, specs = {}, []
    for i, weight in enumerate(weights):
        spec, groups = spec_of(weight), weight.groups
        if i in (0, 3):
            a, b = torch.randn(groups, 1 + i // 3), torch.randn(1 + i // 3, INNER).half()
            factors[i] = a, b
            weights[i] = weight._replace(offsets=(a @ b.float()))
            spec = replace(spec, offset_dtype="float16", offset_rank=1 + i // 3)
        elif i == 1:
            weights[i], spec = weight._replace(offsets=None), replace(spec, offset_dtype=None)
        else:
            spec = replace(spec, offset_dtype="float16")
        specs.append(spec)
    layer = QuantExpertLinear(specs)
    for _ in range(2):  # put again, over what was there
        for i, weight in enumerate(weights):
            layer.put(i, weight, factors.get(i))
    assert layer.offsets_a.shape == (EXPERTS, HIDDEN // 32, 2)
    x, counts = torch.randn(2 * EXPERTS, HIDDEN), [2] * EXPERTS
    wanted = torch.cat([part.double() @ w for part, w in zip(x.split(counts), dense(weights), strict=True)])
    assert_close(layer(x, counts), wanted, 1e-6)


def multiplied(gate, up):
    return silu(gate) * up


def clipped(gate, up):
    """GPT-OSS's."""
    gate = gate.clamp(max=7)
    return (up.clamp(-7, 7) + 1) * gate * torch.sigmoid(1.702 * gate)


def make_experts(combine, bias):
    sizes = {"gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}
    made = {name: make_linear(*size, seed=10 * i, bias=bias) for i, (name, size) in enumerate(sizes.items())}
    experts = QuantExperts(**{name: layer for name, (layer, _) in made.items()}, combine=combine)
    return experts, [(dense(weights), biases(layer)) for layer, weights in made.values()]


def defined(x, index, weights, combine, gate, up, down):
    """In float64, token by token."""

    def linear(x, of, e):
        weight, bias = of
        return x @ weight[e] + bias[e]

    rows = []
    for token, chosen, shares in zip(x, index, weights.double(), strict=True):
        parts = [
            s * linear(combine(linear(token, gate, e), linear(token, up, e)), down, e)
            for e, s in zip(chosen, shares, strict=True)
        ]
        rows.append(sum(parts))
    return torch.stack(rows)


@pytest.mark.parametrize(("combine", "bias"), [(multiplied, False), (clipped, True)])
def test_experts_are_the_definition_and_pass_gradients_on(combine, bias):
    experts, weights = make_experts(combine, bias)
    index, shares = routing()
    x, exact = torch.randn(TOKENS, HIDDEN), None
    exact = x.double().requires_grad_()
    x.requires_grad_()
    ours, theirs = shares.clone().requires_grad_(), shares.double().requires_grad_()
    found = experts(x, index, ours)
    wanted = defined(exact, index, theirs, combine, *weights)
    assert_close(found, wanted, 1e-6)
    grad = torch.randn(TOKENS, HIDDEN)
    found.backward(grad)
    wanted.backward(grad.double())
    assert_close(x.grad, exact.grad, 1e-5)
    assert_close(ours.grad, theirs.grad, 1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_every_experts_adapter(shared):
    layer, weights = make_linear(HIDDEN, INNER, 0, act_order=True)
    counts, groups = [3, 0, 4, 1, 0], HIDDEN // 32
    x = torch.randn(sum(counts), HIDDEN)
    lora_a = torch.randn(*(() if shared else (EXPERTS,)), RANK, groups, requires_grad=True)
    lora_b = torch.randn(EXPERTS, INNER, RANK, requires_grad=True)
    exact_a, exact_b = (part.detach().double().requires_grad_() for part in (lora_a, lora_b))
    parts = []
    for e, part in enumerate(x.double().split(counts)):
        g_idx = reference.column_groups(weights[e])
        a = exact_a if shared else exact_a[e]
        parts.append(reference.adapter_linear(part, reference.dequantize(weights[e]), g_idx, a, exact_b[e], SCALING))
    found, wanted = layer(x, counts, OffsetDelta(lora_a, lora_b, SCALING)), torch.cat(parts)
    assert_close(found, wanted, 1e-6)
    grad = torch.randn_like(found)
    found.backward(grad)
    wanted.backward(grad.double())
    assert_close(lora_a.grad, exact_a.grad, 1e-5)
    assert_close(lora_b.grad, exact_b.grad, 1e-5)
    assert not lora_b.grad[1].any()  # an idle expert


@pytest.fixture
def together(monkeypatch):
    """All experts in one kernel, as on CUDA."""
    monkeypatch.setattr(grouped, "takes", lambda x: True)


@pytest.mark.parametrize(("combine", "bias"), [(multiplied, False), (clipped, True)])
def test_experts_together_are_the_definition(together, monkeypatch, combine, bias):
    monkeypatch.setattr(QuantExpertLinear, "expert", None)  # which the other way asks for
    test_experts_are_the_definition_and_pass_gradients_on(combine, bias)


def test_experts_with_much_to_do_run_one_by_one(together):
    chosen = torch.zeros(4, 2, dtype=torch.int64)
    assert grouped.tiles_for(torch.zeros(4, 8), chosen, 2, weights=grouped.LONG // 4) is None
    assert grouped.tiles_for(torch.zeros(4, 8), chosen, 2, weights=grouped.LONG // 8) is not None


@pytest.mark.parametrize("rows", ["a token", "a slot"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_adapters_together_are_those_one_by_one(together, kind, shared, rows):
    """Outputs and all gradients, folded in or, as with dropout, beside the base."""
    layer, _ = make_linear(HIDDEN, INNER, 0, **kind)
    index, _ = routing()
    slots, order = index.flatten(), index.flatten().argsort(stable=True)
    counts = torch.bincount(slots, minlength=EXPERTS).tolist()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(TOKENS if rows == "a token" else len(slots), HIDDEN, generator=generator)
    lora_a = torch.randn(*(() if shared else (EXPERTS,)), RANK, HIDDEN // 32, generator=generator)
    lora_b = torch.randn(EXPERTS, INNER, RANK, generator=generator)
    grad = torch.randn(len(slots), INNER, generator=generator)
    tiles = grouped.tiles_for(tokens, index, EXPERTS, HIDDEN * INNER)

    def run(how):
        x, a, b = (t.clone().requires_grad_() for t in (tokens, lora_a, lora_b))
        y = how(x, OffsetDelta(a, b, SCALING))
        return y, *torch.autograd.grad(y, (x, a, b), grad)

    def one_by_one(x, delta):
        by_slot = x.repeat_interleave(len(slots) // len(x), 0)
        return layer(by_slot[order], counts, delta)[order.argsort()]

    wanted = run(one_by_one)
    beside = run(lambda x, delta: layer(x, tiles) + grouped.adapter(x, layer.quantized, tiles, delta))
    for found in (run(lambda x, delta: layer(x, tiles, delta)), beside):
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs, 1e-5)


def test_idle_experts_are_not_computed(monkeypatch):
    layer, _ = make_linear(HIDDEN, INNER, 0)
    asked = []
    expert = QuantExpertLinear.expert
    monkeypatch.setattr(QuantExpertLinear, "expert", lambda self, i, *of: asked.append(i) or expert(self, i, *of))
    layer(torch.randn(4, HIDDEN), [0, 3, 0, 0, 1])
    assert asked == [1, 4]


def test_nothing_trains_and_nothing_is_stored_by_name():
    layer, _ = make_linear(HIDDEN, INNER, 0, act_order=True)
    assert not list(layer.parameters())
    assert not layer.state_dict()  # their loader gives them the names on disk
