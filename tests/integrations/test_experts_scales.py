"""Experts whose scales train, too: gradients, every path, files, merges."""

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from support.experts import loss_and_gradients
from support.layers import assert_close
from transformers import AutoModelForCausalLM

from qalora_plugin import add_adapter, load_adapter, load_base, merge, verify
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.integrations.peft import scales
from qalora_plugin.integrations.peft.experts import QALoraExpertsLayer
from qalora_plugin.kernels import grouped
from qalora_plugin.layers.experts import QuantExpertLinear

IDS = torch.arange(4, 68).view(2, 32)
OPTIONS = {"r": 4, "target_modules": "all-linear", "scales": True}
COUNTS = [3, 0, 4, 1]


@pytest.fixture(scope="module")
def adapter(mixtral, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    randomised(add_adapter(load_base(mixtral, dtype=torch.float32), **OPTIONS)).save_pretrained(folder)
    return folder


def randomised(model, std=0.05):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, std, generator=generator)
    return model


def expert_layers(model):
    return [module for module in model.modules() if isinstance(module, QALoraExpertsLayer)]


def defined(layer, x, factors):
    """float64, expert by expert; ``factors``: A, B, D and C of one adapter."""
    ratios, parts = layer.ratios["default"], []
    a, b = (ratios.offsets * factor for factor in factors[:2])
    d, c = (ratios.scales * factor for factor in factors[2:])
    for e, part in enumerate(x.double().split(COUNTS)):
        weight = layer.get_base_layer().expert(e)
        group = reference.column_groups(weight)
        offsets = reference.adapter_offsets(a[e], b[e], layer.scaling["default"], weight.scales)
        parts.append(part @ (reference.scaled_weight(weight, d[e], c[e]) + offsets[group]))
    return torch.cat(parts)


@pytest.mark.parametrize("training", [False, True])
def test_every_experts_scales_and_their_gradients(mixtral, adapter, monkeypatch, training):
    """Of every token here, so that there is one right answer; what reaches A, B, D, C does not know of their ratio."""
    monkeypatch.setattr(scales, "GRADIENT_EVERY", 1)
    model = load_adapter(load_base(mixtral, dtype=torch.float32), adapter, is_trainable=True).train(training)
    for layer in expert_layers(model):
        held = [part["default"].weight for part in (layer.lora_A, layer.lora_B, layer.lora_D, layer.lora_C)]
        x = torch.randn(sum(COUNTS), layer.get_base_layer().in_features)
        exact = [factor.detach().double().requires_grad_() for factor in held]
        found, wanted = layer(x, COUNTS), defined(layer, x, exact)
        assert_close(found, wanted, 2e-6)
        grad = torch.randn_like(found)
        offsets, steps = layer.ratios["default"]
        gradients = zip(
            torch.autograd.grad(found, held, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
        )
        for (ours, theirs), ratio in zip(gradients, (offsets, offsets, steps, steps), strict=True):
            assert_close(ratio * ours, theirs, 1e-5)
            assert not ours[1].any()  # an idle expert


def test_untouched_until_it_is_trained(mixtral):
    plain = load_base(mixtral, dtype=torch.float32)
    expected = plain(IDS).logits
    model = add_adapter(plain, **OPTIONS)
    assert torch.equal(model(IDS).logits, expected)
    for layer in expert_layers(model):
        a, d, c = (part["default"].weight for part in (layer.lora_A, layer.lora_D, layer.lora_C))
        assert d.shape == a.mT.shape
        assert not c.any()
        assert len({tuple(one.flatten().tolist()) for one in d}) == len(d)  # each expert starts by itself
        assert a.abs().max() <= layer.get_base_layer().groups ** -0.5 / 3


def test_what_scales_an_adapter_scales_all_of_it(mixtral, adapter):
    model = load_adapter(load_base(mixtral, dtype=torch.float32), adapter)
    layer = expert_layers(model)[0]
    x = torch.randn(sum(COUNTS), layer.get_base_layer().in_features)
    none, whole = layer.get_base_layer()(x, COUNTS), layer(x, COUNTS)
    with rescale_adapter_scale(model, 0.5):
        torch.testing.assert_close(layer(x, COUNTS), (none + whole) / 2, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x, COUNTS), whole)


def test_several_adapters_and_dropout(mixtral, adapter):
    model = load_adapter(load_base(mixtral, dtype=torch.float32), adapter).eval()
    model.load_adapter(adapter, "again")
    layer = expert_layers(model)[0]
    x = torch.randn(sum(COUNTS), layer.get_base_layer().in_features)
    base, one = layer.base_layer(x, COUNTS), layer(x, COUNTS)
    layer.lora_dropout["default"] = torch.nn.Dropout(0.5).eval()
    torch.testing.assert_close(layer(x, COUNTS), one)
    for factor in (layer.lora_A["again"], layer.lora_C["again"]):
        factor.weight.data.zero_()
    model.base_model.set_adapter(["default", "again"])  # the second adds nothing: the other path, same result
    torch.testing.assert_close(layer(x, COUNTS), one, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(layer(x, COUNTS), base)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_kernel_for_all_experts_trains_as_one_by_one(mixtral, adapter, monkeypatch, dropout):
    """Through the model; on CUDA it is the usual way."""
    monkeypatch.setattr(scales, "GRADIENT_EVERY", 1)
    model = load_adapter(load_base(mixtral, dtype=torch.float32), adapter, is_trainable=True).eval()
    if dropout:
        for layer in expert_layers(model):
            layer.lora_dropout["default"] = torch.nn.Dropout(dropout).eval()  # another path, the same result
    one_by_one = loss_and_gradients(model, IDS)
    monkeypatch.setattr(grouped, "takes", lambda x: True)
    monkeypatch.setattr(QuantExpertLinear, "expert", None)  # which the other way asks for
    for ours, theirs in zip(loss_and_gradients(model, IDS), one_by_one, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_in_act_order_they_run_one_by_one(mixtral, adapter, monkeypatch):
    """On a GPU, too, and where ranks share the weights, whose layout alone says what they are."""
    monkeypatch.setattr(grouped, "takes", lambda x: True)
    model = load_adapter(load_base(mixtral, dtype=torch.float32), adapter, is_trainable=True)
    layers = expert_layers(model)
    assert not any(layer.one_by_one for layer in layers)
    for layer in layers:
        base, in_order = layer.get_base_layer(), torch.arange(layer.get_base_layer().in_features)
        base.group_order = in_order.expand(base.experts, -1).clone()
        base.g_idx = (in_order // base.group_size).int().expand(base.experts, -1).clone()
    assert all(layer.one_by_one for layer in layers)
    monkeypatch.setattr(grouped, "linear", None)
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.lora_C["default"].weight.grad.any() for layer in layers)
    for layer in layers:
        layer.get_base_layer().make_shardable(torch.float32)
        assert layer.one_by_one
    with model.disable_adapter():
        assert not any(layer.one_by_one for layer in layers)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_merged_exactly_and_read_back(mixtral, adapter, tmp_path, dtype):
    merged = merge(mixtral, adapter, tmp_path / "merged", offset_dtype=dtype, progress=False).folder
    assert verify(mixtral, adapter, merged, sequences=IDS.tolist(), device="cpu", progress=False).passed
    base, result, opened = (
        QuantizedCheckpoint.open(mixtral),
        QuantizedCheckpoint.open(merged),
        AdapterFolder.open(adapter),
    )
    for name in opened.modules:
        weight = base.weight(name)
        d, c = (torch.from_numpy(factor) for factor in opened.scale_factors(name))
        a, b = (torch.from_numpy(factor) for factor in opened.factors(name))
        offsets = reference.adapter_offsets(a, b, opened.scaling(name), weight.scales)
        wanted = reference.scaled_weight(weight, d, c) + offsets[reference.column_groups(weight)]
        assert_close(reference.dequantize(result.weight(name)), wanted, {"float16": 1e-3, "float32": 1e-6}[dtype])
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    first, again = Checkpoint.open(merged), Checkpoint.open(tmp_path / "again")
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(first.tensor(name), again.tensor(name)) for name in first.tensors)


def test_merged_twice(mixtral, adapter, tmp_path):
    once = merge(mixtral, adapter, tmp_path / "once", progress=False).folder
    second = tmp_path / "second"
    randomised(add_adapter(load_base(once, dtype=torch.float32), **OPTIONS)).save_pretrained(second)
    twice = merge(once, second, tmp_path / "twice", progress=False).folder
    assert verify(once, second, twice, sequences=IDS.tolist(), device="cpu", progress=False).passed


def test_a_damaged_stack_is_refused(mixtral, adapter, tmp_path):
    from shutil import copytree

    from safetensors.torch import load_file, save_file

    folder = copytree(adapter, tmp_path / "damaged")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "experts" in name and "lora_C" in name)
    save_file(tensors | {name: tensors[name][:2].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(QALoraError, match="are not those of a layer's experts"):
        merge(mixtral, folder, tmp_path / "merged", progress=False)
