import pytest
import torch
from support.layers import (
    adapter_for,
    assert_close,
    column_groups,
    delta,
    make_layer,
    reference_weight,
    scale_factors_for,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qalora_plugin.core.delta import ScaleDelta, factored_offsets
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.layers.linear import QuantLinear


def test_group_size_must_divide_k():
    with pytest.raises(QALoraError, match="group size 48 does not divide in_features 128"):
        QuantLinear(GroupwiseSpec("layer", 128, 64, 4, 48))


def test_sizes_must_pack():
    with pytest.raises(QALoraError, match="multiples of 8"):
        QuantLinear(GroupwiseSpec("layer", 128, 60, 4, 32))


def test_nothing_trains_and_nothing_is_a_parameter():
    layer = make_layer(64, 32, 4, 32, act_order=True, bias=True, offsets=True)
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"qweight", "zeros", "scales", "g_idx", "bias", "offsets"}


def test_a_layer_moves_with_all_its_tensors():
    layer = make_layer(64, 32, 4, 32, act_order=True, bias=True, offsets=True).to("meta")
    assert all(tensor.is_meta for tensor in (*layer.quantized.tensors, layer.bias))


def test_a_layer_of_one_group():
    assert make_layer(64, 32, 4, -1).groups == 1
    assert make_layer(64, 32, 4, -1)(torch.ones(2, 64)).shape == (2, 32)


@pytest.mark.parametrize("sharded", [False, True])
def test_factored_offsets_are_multiplied_at_every_use(sharded):
    """To what is dense beside them, too, were there any; and whole in the flat parameter of FSDP2 and ZeRO-3."""
    layer = make_layer(64, 32, 4, 32, offsets=True)
    beside, a, b = layer.offsets.float(), torch.randn(2, 3), torch.randn(3, 32).half()
    layer.offsets_a, layer.offsets_b = a, b
    x, weight = torch.randn(5, 64), layer.dense_weight(torch.float64)
    if sharded:
        layer.make_shardable(torch.bfloat16)
    assert torch.equal(layer.quantized.offsets, beside + a @ b.float())
    assert_close(layer(x), x.double() @ weight, 1e-6)


def test_what_is_stored_beside_the_weight_is_kept_as_it_is_stored():
    """Between forward and backward, too: completed, it would be float32 [G, N] a linear."""
    layer = make_layer(64, 32, 4, 32, act_order=True)
    layer.scales_delta = 0.1 * layer.scales.abs()
    layer.offsets_a, layer.offsets_b = torch.randn(2, 3), torch.randn(3, 32).half()
    x, (lora_a, lora_b) = torch.randn(5, 64, requires_grad=True), adapter_for(layer, 2)
    weight = reference_weight(layer)
    y = layer(x, delta(lora_a, lora_b))
    stored = {id(tensor) for tensor in layer.buffers()}
    held = [*y.grad_fn.weight.tensors, *y.grad_fn.beside]
    assert all(id(tensor) in stored for tensor in held if tensor is not None)
    (dx,) = torch.autograd.grad(y.sum(), x)
    offsets = (lora_b.double() @ lora_a.double()).t()
    assert_close(dx, (weight + offsets[column_groups(layer)]).sum(1).expand(5, -1), 1e-6)


def test_another_act_order_that_is_loaded_is_pooled_by():
    """``load_state_dict`` fills ``g_idx``; what is sorted by it is not stored."""
    layer, other = (make_layer(64, 32, 4, 32, act_order=True, seed=seed) for seed in (0, 1))
    layer.load_state_dict(other.state_dict())
    x = torch.randn(5, 64)
    factors = adapter_for(layer, 2)
    ours, theirs = (torch.autograd.grad(one(x, delta(*factors)).sum(), factors) for one in (layer, other))
    assert all(map(torch.equal, ours, theirs))


def test_a_row_without_a_batch():
    layer = make_layer(64, 32, 4, 32)
    x, factors = torch.randn(64, requires_grad=True), (*adapter_for(layer, 2), *scale_factors_for(layer, 2))
    changes = delta(*factors[:2]), ScaleDelta(*factors[2:])
    found = torch.autograd.grad(layer(x, *changes).sum(), (x, *factors))
    for ours, wanted in zip(found, torch.autograd.grad(layer(x[None], *changes).sum(), (x, *factors)), strict=True):
        assert torch.equal(ours, wanted)


def test_what_has_no_numbers_leaves_none_behind():
    """Shapes alone, as where memory is estimated, on the meta device or with torch's fake tensors."""
    layer = make_layer(96, 32, 4, 32)
    factors = adapter_for(layer, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(torch.empty(5, 96, requires_grad=True), delta(*factors))
        assert y.shape == (5, 32)
        y.sum().backward()
    y = layer(torch.randn(5, 96))
    assert not isinstance(y, FakeTensor)
    meta = make_layer(96, 32, 4, 32).to("meta")
    assert meta(torch.empty(5, 96, device="meta")).shape == (5, 32)
    assert factored_offsets(torch.empty(3, 2, device="meta"), torch.empty(2, 32, device="meta")).shape == (3, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_model_that_is_cast_keeps_its_scales(dtype):
    """``model.half()`` and ``model.to(torch.bfloat16)`` are for what computes, not for what is stored."""
    layer = make_layer(64, 32, 4, 32, act_order=True, bias=True, offsets=torch.float32)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    weight = layer.dense_weight(torch.float64)
    for cast in (lambda module: module.to(dtype), lambda module: module.type(dtype), lambda module: module.half()):
        after = dict(cast(torch.nn.Sequential(layer)).named_buffers())
        assert all(after[f"0.{name}"].dtype == tensor.dtype for name, tensor in before.items())
        assert all(torch.equal(after[f"0.{name}"], tensor) for name, tensor in before.items())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    bar = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    assert_close(layer(x), x.double() @ weight + layer.bias.double(), bar)
