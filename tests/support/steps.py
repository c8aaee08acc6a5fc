"""Training steps of a small model, and how they are compared."""

import torch
from support.layers import make_layer

IDS = torch.randint(4, 100, (2, 48), generator=torch.Generator().manual_seed(0))
# Of a whole two-layer model, relative to the largest entry of each gradient.
EAGER = 2e-6  # float32, the same arithmetic in another order
COMPILED = 2e-5  # float32, with other sums and fused multiplications in every layer


def with_random_b(model, std=0.02):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_C" in name:
            parameter.data.normal_(0, std, generator=generator)
    return model


def step(model, run=None):
    """The loss and the gradient of every trained parameter, by name."""
    model.zero_grad()
    loss = (model if run is None else run)(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected, tolerance):
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert (loss - expected_loss).abs() <= tolerance * expected_loss.abs()
    lora = {name for name in expected_gradients if "lora_" in name}
    assert gradients.keys() == lora  # nothing but A and B trains
    for name in lora:
        difference = (gradients[name].double() - expected_gradients[name].double()).abs().max()
        assert difference <= tolerance * expected_gradients[name].abs().max(), name


def make_quant_linear(in_features, out_features, seed, bits=4, act_order=False):
    return make_layer(
        in_features, out_features, bits, 32, act_order=act_order, offsets=True, seed=seed, std=in_features**-0.5
    )
