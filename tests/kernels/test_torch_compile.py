"""torch.compile of a model with our layers: one graph, and the same step."""

import pytest
import torch
from support.steps import COMPILED, EAGER, IDS, assert_same_step, make_quant_linear, step, with_random_b
from torch import nn
from torch.nn import functional as F

from qalora_plugin.integrations.peft.adapter import QALoraConfig, QALoraLayer


class Block(nn.Module):
    """A residual MLP of our layers with norms: the shape of a decoder layer, nothing of transformers."""

    def __init__(self, dim, hidden, seed, bits=4, act_order=False, scales=False):
        super().__init__()
        wish = {"scales": True, "scales_lr_ratio": 3.0} if scales else None
        config = QALoraConfig(r=4, lora_alpha=8, qalora=wish)
        self.norm = nn.LayerNorm(dim).requires_grad_(False)
        self.up = QALoraLayer(make_quant_linear(dim, hidden, seed, bits, act_order), "default", config, 4, 8)
        self.down = QALoraLayer(make_quant_linear(hidden, dim, seed + 1, bits, act_order), "default", config, 4, 8)

    def forward(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))


def blocks(**options):
    torch.manual_seed(0)
    return with_random_b(nn.Sequential(*(Block(64, 128, seed, **options) for seed in (0, 10)))), torch.randn(2, 8, 64)


def block_step(model, run, x):
    model.zero_grad()
    torch.manual_seed(1)  # scales sample tokens
    x = x.clone().requires_grad_()
    y = run(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", [{}, {"act_order": True}, {"bits": 3}, {"scales": True}])
def test_compiled_layers_are_one_graph(variant, autocast):
    """``fullgraph`` refuses a graph break; aot_eager runs the traced forward and backward without a code generator."""
    model, x = blocks(**variant)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected, found = block_step(model, model, x), block_step(model, compiled, x)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= (2e-2 if autocast else EAGER) * other.abs().max()


def test_no_graph_breaks_in_a_whole_model(model):
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(input_ids=IDS, labels=IDS)
    ours = [str(reason) for reason in explained.break_reasons if "qalora" in str(reason)]
    assert not ours
    assert explained.graph_break_count == 0, explained.break_reasons


def test_compiled_model_takes_the_same_step(model):
    """With inductor, the default: the code that a user's ``torch_compile: true`` runs."""
    torch._dynamo.reset()
    expected = step(model)
    found = step(model, torch.compile(model))
    assert_same_step(found, expected, COMPILED)


def test_compiled_layer_follows_a_change_of_shape():
    model, x = blocks()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (8, 5, 3):
        for one, other in zip(
            block_step(model, compiled, x[:, :tokens]), block_step(model, model, x[:, :tokens]), strict=True
        ):
            assert (one - other).abs().max() <= EAGER * other.abs().max()


@pytest.mark.parametrize("wants_dx", [False, True])
@pytest.mark.parametrize("wants_scales", [None, False, True])
@pytest.mark.parametrize("wants_adapter", [None, False, True])  # None: there is no adapter
def test_ops_pass_opcheck(wants_adapter, wants_scales, wants_dx):
    """torch's own check of a custom op: its schema, its fake tensors, and no output that aliases an input."""
    weight, checks = make_quant_linear(64, 32, 0).quantized, ("test_schema", "test_faketensor")
    stored = (weight.tensors, weight.bits, weight.group_size)
    adapter = (None, None) if wants_adapter is None else (torch.randn(2, 2), torch.randn(32, 2))
    factors = (None, None) if wants_scales is None else (torch.randn(2, 2), torch.randn(2, 32))
    given = (*adapter, 0.5, *factors)
    x = torch.randn(2, 3, 64)
    arguments = (x, *given, bool(wants_adapter), bool(wants_scales), *stored)
    torch.library.opcheck(torch.ops.qalora.linear.default, arguments, test_utils=checks)
    y, pooled, place = torch.ops.qalora.linear(*arguments)
    kept = (pooled, *((place, x) if wants_scales else (None, None)), 4)
    arguments = (torch.randn_like(y), *kept, *given, wants_dx, bool(wants_adapter), *stored)
    torch.library.opcheck(torch.ops.qalora.linear_backward.default, arguments, test_utils=checks)
