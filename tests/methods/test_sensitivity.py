"""Costs of choices against the errors of the layer's own output, and their order."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.methods.bit_allocation import CHOICES, Choice, allocate, bits_a_weight, choices_of
from qalora_plugin.methods.dense_source import as_matrix
from qalora_plugin.methods.sensitivity import _costs, _rounding_error, fused, measure, sizes


def tiny(layers):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def measured():
    model = tiny(2)
    linears = {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 64, (32,), generator=generator).tolist() for _ in range(4)]
    return measure(model, linears, sequences, progress=False), linears


@pytest.fixture
def one_layer():
    return tiny(1)


def fisher_information(model, linear, sequences):
    """Its diagonal ``[N, K]``, a mean over tokens, by autograd."""
    gradients, inputs = [], []

    def keep(module, args, output):
        inputs.append(args[0][0].detach())
        output.register_hook(lambda gradient: gradients.append(gradient[0]))

    handle = linear.register_forward_hook(keep)
    for ids in sequences:
        tokens = torch.tensor([ids])
        logits = model(inputs_embeds=model.get_input_embeddings()(tokens).requires_grad_()).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").backward()
    handle.remove()
    x, g = torch.cat(inputs), torch.cat(gradients)
    return g.square().t() @ x.square() / len(x)


def test_fisher_weights_by_the_loss_s_gradients(one_layer):
    sequences, linear = [list(range(3, 35)), list(range(30, 62))], one_layer.model.layers[0].mlp.gate_proj
    (layer,) = measure(one_layer, {"gate": linear}, sequences, fisher=True, progress=False)
    information = fisher_information(one_layer, linear, sequences)
    inputs, outputs = information.sum(0), information.sum(1) / information.sum()
    assert information.all()
    for choice in (Choice(3, 32), Choice(8, 64)):
        expected = _rounding_error(linear.weight.detach(), inputs, choice, outputs)
        assert layer.costs[choice] == pytest.approx(expected, rel=1e-4)


def test_half_the_costs_is_the_divergence(one_layer):
    """Of the rounded model from the one it was, where labels are drawn from it, as Fisher information has it."""
    torch.manual_seed(0)
    for part in one_layer.parameters():
        part.data.mul_(4)
    drawn = one_layer.generate(torch.randint(3, 64, (64, 1)), do_sample=True, max_new_tokens=63, min_new_tokens=63)
    mlp = one_layer.model.layers[0].mlp
    choice, linears = Choice(3, 32), {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
    costs = {layer.names[0]: layer.costs[choice] for layer in measure(one_layer, linears, drawn.tolist(), fisher=True)}
    with torch.no_grad():
        before = one_layer(drawn).logits.log_softmax(-1)
        for linear in linears.values():
            linear.weight.copy_(rounded(linear.weight, choice))
        after = one_layer(drawn).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean().item()
    assert 0.5 < sum(costs.values()) / 2 / divergence < 2


def test_tokens_that_the_loss_does_not_depend_on_cost_nothing(one_layer):
    """Of huge inputs, as the first one of a text often has."""
    linear = one_layer.model.layers[0].mlp.down_proj
    (expected,) = measure(one_layer, {"down": linear}, [list(range(3, 35))], fisher=True, progress=False)
    calls = []

    def huge_at_the_last(module, args):  # whose prediction no label is compared with
        calls.append(x := args[0].clone())
        x[:, -1] *= 1000
        return (x,)

    linear.register_forward_pre_hook(huge_at_the_last)
    (found,) = measure(one_layer, {"down": linear}, [list(range(3, 35))], fisher=True, progress=False)
    assert len(calls) == 1
    assert found.costs == pytest.approx(expected.costs, rel=1e-4)


def test_what_the_loss_does_not_depend_on_costs_nothing(one_layer):
    mlp, sequences = one_layer.model.layers[0].mlp, [list(range(3, 35))]
    mlp.down_proj.weight.data.zero_()
    linears = {"gate": mlp.gate_proj, "down": mlp.down_proj}
    by_inputs, by_fisher = (
        {layer.names[0]: layer.costs for layer in measure(one_layer, linears, sequences, fisher=f)}
        for f in (False, True)
    )
    assert set(by_fisher["gate"].values()) == {0.0}
    assert min(by_inputs["gate"].values()) > 0


def test_linears_that_are_served_as_one_are_one_layer(measured):
    layers, linears = measured
    assert len(layers) == 2 * 4
    assert {len(layer.names) for layer in layers} == {1, 2, 3}
    assert sum(layer.weights for layer in layers) == sum(linear.weight.numel() for linear in linears.values())
    assert fused(["a.q_proj", "b.q_proj", "a.k_proj"]) == [("a.q_proj", "a.k_proj"), ("b.q_proj",)]


def test_more_bits_cost_less_and_only_fitting_groups_are_offered(measured):
    layers, _ = measured
    for layer in layers:
        for group_size in {choice.group_size for choice in layer.costs}:
            by_bits = [layer.costs[Choice(bits, group_size)] for bits in (2, 3, 4, 8)]
            assert by_bits == sorted(by_bits, reverse=True)
    assert {choice.group_size for choice in layers[0].costs} == {32, 64}  # of 64 columns


def rounded(weight, choice):
    """To nearest, on a grid from the least to the largest of each group."""
    grouped, top = weight.unflatten(1, (-1, choice.group_size)), 2**choice.bits - 1
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    step = (high - low) / top
    zero = (-low / step).round()
    return (((grouped / step + zero).round().clamp(0, top) - zero) * step).flatten(1)


def test_cost_is_the_error_of_outputs_of_independent_inputs():
    generator = torch.Generator().manual_seed(0)
    weight, deviation = torch.randn(16, 64, generator=generator), torch.rand(64, generator=generator) + 0.1
    x = torch.randn(20000, 64, generator=generator) * deviation
    error = (x @ (weight - rounded(weight, Choice(4, 32))).t()).square().sum(1).mean().item()
    cost = _rounding_error(weight, deviation.square(), Choice(4, 32), torch.ones(16))
    assert 0.7 * error < cost < 1.03 * error  # clipping can only help


def test_the_whole_way_to_an_allocation(measured):
    layers, _ = measured
    chosen = allocate(layers, 4.0)
    assert 3.4 < bits_a_weight(layers, chosen) <= 4.0


def test_linears_that_no_text_comes_to(one_layer):
    """Their error would be 0 whatever they lost."""
    linears = {"idle": nn.Linear(64, 64), "q": one_layer.model.layers[0].self_attn.q_proj}
    with pytest.raises(QALoraError, match="idle is not reached by calibration text"):
        measure(one_layer, linears, [[1, 2, 3]], progress=False)


def test_choices_that_a_base_can_hold():
    """Codes of 3 bits fill words 32 at a time."""
    (narrow,) = sizes({"narrow": nn.Linear(64, 16)})
    assert {choice.bits for choice in narrow.costs} == {2, 4, 8}
    assert {choice.group_size for choice in narrow.costs} == {32, 64}
    (one_size,) = sizes({"narrow": nn.Linear(64, 16)}, choices=choices_of([64]))
    assert {choice.group_size for choice in one_size.costs} == {64}


def test_a_conv1d_costs_what_the_linear_of_the_same_weight_does():
    """GPT-2's: its weight is the transpose."""
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 96), Conv1D(96, 64)
    conv.weight.data = linear.weight.detach().t().clone()
    (expected,), (found,) = sizes({"c": linear}), sizes({"c": conv})
    assert found == expected
    x, y = torch.rand(64) + 0.1, torch.rand(96)
    assert _costs(as_matrix(conv), x, y, CHOICES) == pytest.approx(_costs(linear.weight, x, y, CHOICES))


def test_the_order_of_columns_counts(one_layer):
    linears = {name: part for name, part in one_layer.model.named_modules() if isinstance(part, nn.Linear)}
    for plain, ordered in zip(sizes(linears), sizes(linears, act_order=True), strict=True):
        columns = sum(linears[name].in_features for name in plain.names)
        assert ordered.bits(Choice(4, 32)) == plain.bits(Choice(4, 32)) + 32 * columns


def test_what_vllm_fuses_in_other_families():
    names = ["a.in_proj_qkv", "a.in_proj_z", "a.in_proj_b", "a.in_proj_a", "a.out_proj", "a.kv_a_proj_with_mqa"]
    assert fused([*names, "a.q_a_proj"]) == [
        ("a.in_proj_qkv", "a.in_proj_z"), ("a.in_proj_b", "a.in_proj_a"), ("a.out_proj",),
        ("a.kv_a_proj_with_mqa", "a.q_a_proj"),
    ]  # fmt: skip
