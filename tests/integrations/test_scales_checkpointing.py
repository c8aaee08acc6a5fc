"""Scales under activation checkpointing: which tokens stand for all is drawn alike, whether gradients are recorded."""

import pytest
import torch
from support.fabricate import make_base
from support.steps import IDS

from qalora_plugin import QALoraConfig, add_adapter, load_base
from qalora_plugin.kernels import autograd

RATES = {"as a LoRA's": {}, "another": {"scales_lr_ratio": 2.0}}
OPTIONS = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("checkpointing") / "base")


@pytest.fixture
def places(monkeypatch):
    """What was drawn for each linear, noted as it goes backward."""
    found, backward = [], autograd._backward

    def spied(dy, pooled, place, *rest):
        found.append(None if place is None else place.item())
        return backward(dy, pooled, place, *rest)

    monkeypatch.setattr(autograd, "_backward", spied)
    return found


def with_adapter(base, dropout=0.0, **options):
    model = add_adapter(load_base(base, dtype=torch.float32), scales=True, lora_dropout=dropout, **OPTIONS, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model.train()


def gradients(model, steps=1):
    torch.manual_seed(0)
    for _ in range(steps):
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rate", RATES)
def test_the_same_gradients(base, rate, dropout, reentrant):
    """Axolotl's own choice is the reentrant kind, which records nothing at first."""
    expected = gradients(with_adapter(base, dropout, **RATES[rate]), steps=2)
    found = gradients(checkpointed(with_adapter(base, dropout, **RATES[rate]), reentrant), steps=2)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_same_gradients_of_adapters_together_and_scaled(base, reentrant):
    def model():
        torch.manual_seed(0)
        made = with_adapter(base)
        bound = made.peft_config["default"].qalora
        made.add_adapter("second", QALoraConfig(r=2, target_modules=["q_proj", "down_proj"], qalora=bound))
        made.base_model.set_adapter(["default", "second"])
        for layer in made.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 0.5)
        return made

    expected, found = gradients(model()), gradients(checkpointed(model(), reentrant))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("rate", RATES)
def test_every_step_draws_anew(base, places, rate):
    model = checkpointed(with_adapter(base, **RATES[rate]), reentrant=True)
    gradients(model, steps=3)
    assert None not in places
    assert len(set(places)) == len(places) == 3 * 14


def test_evaluation_draws_nothing(base, places):
    """It would change what training draws next; and gradients of a model that is evaluated are of all tokens."""
    model = with_adapter(base).eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        model(IDS)
    model(IDS, labels=IDS).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert places == [None] * 14
