"""Bases with quantized experts: loading, refusals, and their adapters in PEFT."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.experts import copied, loss_and_gradients, save_random
from transformers import AutoModelForCausalLM

from qalora_plugin import add_adapter, load_adapter, load_base, merge, verify
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.integrations.peft.experts import QALoraExpertsLayer
from qalora_plugin.integrations.peft.sharded import make_shardable
from qalora_plugin.kernels import grouped
from qalora_plugin.layers.experts import QuantExpertLinear

IDS = torch.arange(4, 68).view(2, 32)
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(mixtral, tmp_path_factory):
    return save_random(load_base(mixtral, dtype=torch.float32), tmp_path_factory.mktemp("adapter") / "adapter")


def expert_layers(model):
    return {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if isinstance(m, QALoraExpertsLayer)
    }


def test_every_expert_is_the_one_on_disk_and_none_is_dense(mixtral):
    model, checkpoint = load_base(mixtral, dtype=torch.float32), QuantizedCheckpoint.open(mixtral)
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantExpertLinear)}
    assert len(found) == 6
    stored = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, layer in found.items():
        parent, _, leaf = name.rpartition(".")
        for i, weight in enumerate(layer.dense_weight()):
            on_disk = f"{parent.replace('mlp', 'block_sparse_moe')}.{i}.{stored[leaf]}"
            assert torch.equal(weight, reference.dequantize(checkpoint.weight(on_disk), torch.float32))
    assert not any("proj" in name and "experts" in name for name, _ in model.named_parameters())
    assert {"g_idx", "group_order"}.isdisjoint(name for name, _ in layer.named_buffers())  # not in act-order


def test_experts_in_act_order_each_by_its_own(qwen, tmp_path):
    tensors = load_file(qwen / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    names = [name for name in tensors if re.search(r"experts\.[12]\..*g_idx", name)]
    for name in names:
        tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=generator)]
    base = copied(qwen, tmp_path / "base", tensors)
    model, checkpoint = load_base(base, dtype=torch.float32), QuantizedCheckpoint.open(base)
    layer = model.model.layers[0].mlp.experts.up_proj
    for i, weight in enumerate(layer.dense_weight()):
        stored = checkpoint.weight(f"model.layers.0.mlp.experts.{i}.up_proj")
        assert (stored.g_idx is not None) == (i in (1, 2))
        assert torch.equal(weight, reference.dequantize(stored, torch.float32))
    adapter = save_random(model, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged", offset_dtype="float32", progress=False).folder
    assert verify(base, adapter, merged, sequences=IDS.tolist(), device="cpu", progress=False).passed


@pytest.mark.parametrize("names", [MLP, ["w1", "w2", "w3"], "all-linear", r".*\.(gate|up|down)_proj"], ids=str)
def test_the_usual_targets_reach_experts(mixtral, names):
    model = add_adapter(load_base(mixtral), r=2, target_modules=names)
    experts = [f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in MLP]
    assert sorted(expert_layers(model)) == sorted(experts)
    shapes = {tuple(m.lora_B["default"].weight.shape) for m in expert_layers(model).values()}
    assert shapes == {(4, 128, 2), (4, 64, 2)}
    assert all(m.lora_A["default"].weight.requires_grad for m in expert_layers(model).values())


def test_peft_itself_puts_ours_on(qwen):
    model = get_peft_model(load_base(qwen), LoraConfig(r=2, target_modules=["q_proj", *MLP]))
    assert len(expert_layers(model)) == 6
    assert not model.peft_config["default"].target_parameters


def test_a_new_adapter_changes_nothing_and_starts_each_expert_by_itself(qwen):
    model = load_base(qwen, dtype=torch.float32).eval()
    before = model(IDS).logits
    peft_model = add_adapter(model, r=4, target_modules=MLP)
    assert torch.equal(peft_model(IDS).logits, before)
    lora_a = next(iter(expert_layers(peft_model).values())).lora_A["default"].weight
    assert lora_a.shape[0] == len({tuple(one.flatten().tolist()) for one in lora_a}) == 4


def test_saved_loaded_disabled_and_two_at_once(mixtral, adapter, tmp_path):
    model = load_adapter(load_base(mixtral, dtype=torch.float32), adapter).eval()
    stored = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.gate_proj.lora_{}.weight"
    layer = expert_layers(model)["model.layers.0.mlp.experts.gate_proj"]
    assert torch.equal(stored[key.format("A")], layer.lora_A["default"].weight)
    assert torch.equal(stored[key.format("B")], layer.lora_B["default"].weight)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, load_base(mixtral, dtype=torch.float32).eval()(IDS).logits)
    x, counts = torch.randn(6, 64), [2, 0, 3, 1]
    alone = layer(x, counts) - layer.base_layer(x, counts)
    model.load_adapter(adapter, "again")
    model.base_model.set_adapter(["default", "again"])
    torch.testing.assert_close(layer(x, counts) - layer.base_layer(x, counts), 2 * alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", [1, 2])
def test_one_kernel_for_all_experts_trains_as_one_by_one(mixtral, adapter, monkeypatch, active):
    """Through the model; on CUDA it is the usual way. Two adapters at once take their own path, as dropout does."""
    model = load_adapter(load_base(mixtral, dtype=torch.float32), adapter, is_trainable=True)
    if active == 2:
        model.load_adapter(adapter, "again", is_trainable=True)
        model.base_model.set_adapter(["default", "again"])
    one_by_one = loss_and_gradients(model, IDS)
    assert len(one_by_one) == 1 + active * 28
    monkeypatch.setattr(grouped, "takes", lambda x: True)
    monkeypatch.setattr(QuantExpertLinear, "expert", None)  # which the other way asks for
    for ours, theirs in zip(loss_and_gradients(model, IDS), one_by_one, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_dropout_takes_the_second_path(qwen):
    model = add_adapter(load_base(qwen, dtype=torch.float32), r=4, lora_dropout=0.5, target_modules=["up_proj"])
    layer = next(iter(expert_layers(model).values()))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x, counts = torch.ones(4, 64), [1, 0, 0, 3]
    model.train()
    torch.manual_seed(0)
    noisy = torch.stack([layer(x, counts) for _ in range(100)]).mean(0)
    model.eval()
    exact = layer(x, counts)
    assert (noisy - exact).abs().max() < 0.4 * (exact - layer.base_layer(x, counts)).abs().max()


@pytest.mark.parametrize("shared", [False, True])
def test_merged_experts_are_exact_one_by_one(mixtral, tmp_path, shared):
    adapter = save_random(
        load_base(mixtral), tmp_path / "adapter", shared_a=shared, rank_pattern={"experts.up_proj": 2}
    )
    opened = AdapterFolder.open(adapter)
    assert opened.modules[:2] == [
        "model.layers.0.block_sparse_moe.experts.0.w1",
        "model.layers.0.block_sparse_moe.experts.0.w2",
    ]
    merged = merge(mixtral, adapter, tmp_path / "merged", offset_dtype="float32", progress=False).folder
    base, result = QuantizedCheckpoint.open(mixtral), QuantizedCheckpoint.open(merged)
    factors = load_file(adapter / "adapter_model.safetensors")
    for i in range(4):
        name, key = (
            f"model.layers.1.block_sparse_moe.experts.{i}.w3",
            "base_model.model.model.layers.1.mlp.experts.up_proj",
        )
        lora_a, lora_b = factors[f"{key}.lora_A.weight"], factors[f"{key}.lora_B.weight"]
        assert lora_a.ndim == (2 if shared else 3)
        added = reference.adapter_offsets(lora_a if shared else lora_a[i], lora_b[i], 8 / 2)
        wanted = reference.dequantize(base.weight(name)) + added.repeat_interleave(32, 0)
        found = reference.dequantize(result.weight(name))
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert shared or verify(mixtral, adapter, merged, sequences=IDS.tolist(), device="cpu", progress=False).passed


@pytest.mark.parametrize(("name", "form"), [("mixtral", "dense"), ("mixtral", "factored"), ("gpt_oss", "dense")])
def test_a_merged_model_loads_and_saves_back_bit_equal(request, tmp_path, name, form):
    base = request.getfixturevalue(name)
    adapter = save_random(load_base(base, dtype=torch.float32), tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged", progress=False, offsets=form).folder
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    first, again = Checkpoint.open(merged), Checkpoint.open(tmp_path / "again")
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(first.tensor(name), again.tensor(name)) for name in first.tensors)


def test_experts_whose_offsets_are_factored(mixtral, tmp_path):
    """Some of one projection: then those of a second adapter, whose ranks add up; all are held as factors."""
    targets = r".*layers\.0.*(up|down)_proj|.*q_proj"
    first = save_random(load_base(mixtral, dtype=torch.float32), tmp_path / "first", r=1, target_modules=targets)
    once = merge(mixtral, first, tmp_path / "once", progress=False, offsets="factored").folder
    assert verify(mixtral, first, once, sequences=IDS.tolist(), device="cpu", progress=False).passed
    model = load_base(once, dtype=torch.float32)
    layer, name = model.get_submodule("model.layers.0.mlp.experts.up_proj"), "model.layers.0.block_sparse_moe.experts"
    assert layer.offsets is None
    opened = QuantizedCheckpoint.open(once)
    for i in range(4):
        assert torch.equal(layer.expert(i).offsets, opened.weight(f"{name}.{i}.w3").offsets)
    second = save_random(model, tmp_path / "second", r=1)
    twice = merge(once, second, tmp_path / "twice", progress=False, offsets="factored").folder
    found = QuantizedCheckpoint.open(twice)
    assert (found.specs[f"{name}.0.w3"].offset_rank, found.specs[f"{name}.0.w1"].offset_rank) == (2, 1)
    assert verify(once, second, twice, sequences=IDS.tolist(), device="cpu", progress=False).passed


@pytest.mark.parametrize(
    ("name", "options"),
    [("mixtral", {}), ("mixtral", {"shared_a": True}), ("mixtral", {"scales": True}), ("gpt_oss", {})],
)
def test_made_shardable_they_compute_the_same(request, name, options):
    """Every tensor of all experts in one flat parameter a projection, factors read through calls."""
    base = request.getfixturevalue(name)
    model = add_adapter(load_base(base, dtype=torch.float32), r=4, target_modules=MLP, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05)
    torch.manual_seed(0)  # of the tokens that stand for all
    expected = model(IDS, labels=IDS)
    wanted = torch.autograd.grad(expected.loss, [p for p in model.parameters() if p.requires_grad])
    make_shardable(model.get_base_model())
    layers = [m for m in model.modules() if isinstance(m, QuantExpertLinear)]
    assert layers
    for layer in layers:
        assert not list(layer.buffers())
        assert [name for name, _ in layer.named_parameters()] == ["words"]
        assert not layer.words.requires_grad
    torch.manual_seed(0)
    found = model(IDS, labels=IDS)
    assert torch.equal(found.logits, expected.logits)
    gradients = torch.autograd.grad(found.loss, [p for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(gradients, wanted, strict=True))


def test_export_as_lora_is_refused(mixtral, adapter, tmp_path):
    with pytest.raises(QALoraError, match=r"on the experts of a mixture-of-experts model .*qalora merge"):
        export_lora(adapter, tmp_path / "lora", mixtral)
    assert not (tmp_path / "lora").exists()
