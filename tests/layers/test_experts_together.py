"""All experts in one kernel, as on CUDA, with scales that train: against one expert after another."""

import pytest
import torch
from support.layers import assert_close
from support.stacked import EXPERTS, HIDDEN, INNER, RANK, SCALING, TOKENS, make_linear, routing

from qalora_plugin.core.delta import OffsetDelta, ScaleDelta
from qalora_plugin.kernels import grouped
from qalora_plugin.kernels.triton.grouped import Tiles


def factors(shared=False):
    """A, B, D and C of all experts."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(RANK, HIDDEN // 32), (EXPERTS, INNER, RANK), (EXPERTS, HIDDEN // 32, RANK), (EXPERTS, RANK, INNER)]
    shapes[0] = shapes[0] if shared else (EXPERTS, *shapes[0])
    return [0.2 * torch.randn(*shape, generator=generator) for shape in shapes]


class Run:
    """A layer, tokens and what flows back, for one way of computing after another."""

    def __init__(self, rows="a token", **kind):
        self.layer, _ = make_linear(HIDDEN, INNER, 0, **kind)
        index, _ = routing()
        self.slots, self.tiles = index.flatten(), Tiles.of(index, EXPERTS)
        generator = torch.Generator().manual_seed(4)
        self.tokens = torch.randn(TOKENS if rows == "a token" else len(self.slots), HIDDEN, generator=generator)
        self.grad = torch.randn(len(self.slots), INNER, generator=generator)

    def step(self, how, parts, every=1):
        """y, and the gradients of x, A, B, D, C."""
        x, a, b, d, c = (part.clone().requires_grad_() for part in (self.tokens, *parts))
        y = how(x, OffsetDelta(a, b, SCALING), ScaleDelta(d, c, every))
        return y, *torch.autograd.grad(y, (x, a, b, d, c), self.grad.to(y.dtype))

    def one_by_one(self, x, delta, scales):
        order = self.slots.argsort(stable=True)
        by_slot = x.repeat_interleave(len(self.slots) // len(x), 0)
        counts = torch.bincount(self.slots, minlength=EXPERTS).tolist()
        return self.layer(by_slot[order], counts, delta, scales)[order.argsort()]

    def together(self, x, delta, scales):
        return self.layer(x, self.tiles, delta, scales)

    def beside(self, x, delta, scales):
        """As with dropout."""
        added = grouped.adapter(x, self.layer.quantized, self.tiles, delta, in_steps=True)
        return self.layer(x, self.tiles, None, scales) + added


@pytest.mark.parametrize("rows", ["a token", "a slot"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [{}, {"offsets": True}, {"bias": True}, {"bits": 3}, {"bits": 8}], ids=str)
def test_scales_train_together_as_one_by_one(kind, shared, rows):
    run, parts = Run(rows, **kind), factors(shared)
    wanted = run.step(run.one_by_one, parts)
    for found in (run.step(run.together, parts), run.step(run.beside, parts)):
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs, 1e-5)


def test_few_slots_stand_for_all():
    """Their mean over draws is the gradient of all; the same draw gives the same; x, A and B know nothing of it."""
    run, parts = Run(), factors()
    wanted, found = run.step(run.together, parts), []
    for seed in [*range(100), 0]:
        torch.manual_seed(seed)
        found.append(run.step(run.together, parts, every=2))
    for of_all, first, last in zip(wanted[:4], found[0][:4], found[-1][:4], strict=True):
        assert torch.equal(of_all, first)
        assert torch.equal(of_all, last)
    for i in (4, 5):
        assert torch.equal(found[0][i], found[-1][i])
        mean = torch.stack([one[i] for one in found[:-1]]).mean(0)
        assert torch.nn.functional.cosine_similarity(mean.flatten(), wanted[i].flatten(), dim=0) > 0.99


def test_no_tokens_have_no_gradient():
    run, parts = Run(), factors()
    run.tokens, run.grad = run.tokens[:0], run.grad[:0]
    run.tiles = Tiles.of(torch.zeros(0, 2, dtype=torch.int64), EXPERTS)
    for part in run.step(run.together, parts, every=4)[2:]:
        assert not part.any()


@pytest.mark.parametrize("train_scales", [False, True])
def test_autocast_rounds_tokens_and_not_what_an_adapter_is(train_scales):
    """(float16: the interpreter's products are wrong in bfloat16.) Factors multiplied in 16 bits would be 1e-3 off."""
    run, (a, b, d, c) = Run(offsets=True), factors()
    scales = ScaleDelta(d, c) if train_scales else None
    with torch.autocast("cpu", torch.float16):
        found = grouped._changed(run.layer.quantized, a, b, SCALING, *(scales or (None, None))[:2])
        y = run.layer(run.tokens, run.tiles, OffsetDelta(a, b, SCALING), scales)
    assert y.dtype == torch.float16
    wanted = grouped._changed(run.layer.quantized, a, b, SCALING, *(scales or (None, None))[:2])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0].scales, wanted[0].scales)
    assert_close(y, run.layer(run.tokens.half().float(), run.tiles, OffsetDelta(a, b, SCALING), scales), 2e-3)


def test_gradients_inside_autocast_are_those_outside():
    """``loss.backward()`` may run under it, which would multiply them in 16 bits."""
    run, parts = Run(), factors()
    x, a, b, d, c = (part.clone().requires_grad_() for part in (run.tokens, *parts))
    y, found = run.layer(x, run.tiles, OffsetDelta(a, b, SCALING), ScaleDelta(d, c)), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            found.append(torch.autograd.grad(y, (x, a, b, d, c), run.grad, retain_graph=True))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
