"""Packed weights as FSDP2 shards them: one flat parameter a linear, whose views are the weight, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from families.architectures import build
from families.bases import make_base_of
from layers.sharded_ranks import CASES
from support.fabricate import make_base
from support.layers import make_layer
from support.two_processes import launch

from qalora_plugin import add_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.qalora import QALora
from qalora_plugin.integrations.peft.sharded import make_shardable
from qalora_plugin.integrations.transformers.stored_tensors import as_stored
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.layers.sharding import flatten, views

TENSORS = [
    torch.arange(-7, 8, dtype=torch.int32),  # as bfloat16 or float16, some of these are NaN
    None,
    torch.full((3, 5), 200, dtype=torch.uint8),
    torch.tensor([[1.5, -2.0]], dtype=torch.float16),
    torch.arange(4),
]


def test_a_shardable_layer_is_saved_whole():
    """As ZeRO's first stages leave it: all in one parameter, which a save takes apart."""
    layer = make_layer(64, 32, 4, 32, act_order=True, bias=True)
    layer.scales_delta = layer.scales / 8
    layer.offsets_a, layer.offsets_b = torch.randn(2, 3), torch.randn(3, 32).half()
    spec = GroupwiseSpec(
        "l", 64, 32, 4, 32, bias_dtype="float16", offset_dtype="float16", has_g_idx=True, offset_rank=3,
        scales_delta_dtype="float16",
    )  # fmt: skip
    fmt = QALora({"checkpoint_format": "gptq"})
    before = as_stored(layer, "l", spec, fmt)
    assert {"l.bias", "l.offsets_a", "l.offsets_b", "l.scales_delta", "l.g_idx", "l.scales"} < set(before)
    layer.make_shardable(torch.bfloat16)
    after = as_stored(layer, "l", spec, fmt)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_are_what_was_flattened(dtype):
    flat, layout = flatten(TENSORS, dtype)
    assert flat.dtype == dtype
    assert not flat.requires_grad
    moved = flat.data.clone()  # what sharding does with it
    for tensor, view in zip(TENSORS, views(moved, layout), strict=True):
        assert (view is None) == (tensor is None)
        assert tensor is None or (view.dtype == tensor.dtype and torch.equal(view, tensor))
        assert view is None or view.data_ptr() % 16 == moved.data_ptr() % 16


def test_a_cast_parameter_is_refused():
    flat, layout = flatten(TENSORS, torch.float32)
    with pytest.raises(QALoraError, match=r"cast from float32 to bfloat16, which destroys .* in bfloat16"):
        views(flat.to(torch.bfloat16), layout)


def test_half_a_parameter_is_refused():
    flat, layout = flatten(TENSORS, torch.float32)
    with pytest.raises(QALoraError, match="sharded over the ranks"):
        views(flat[: len(flat) // 2], layout)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    make_base(folder / "plain")
    make_base(folder / "three", bits=3)
    make_base(folder / "ordered", act_order=True, bias=True)
    experts = make_base_of(build("gpt_oss"), folder / "made", quantize_experts=True).folder
    experts.rename(folder / "experts")
    return folder


@pytest.mark.parametrize("name", ["plain", "three", "ordered"])
def test_without_memory_the_layout_is_the_same(bases, name):
    """A rank that leaves the weights to rank 0 knows from the files' headers, and from g_idx, what it will get."""
    layouts = []
    for place in ("cpu", "meta"):
        model = add_adapter(
            load_base(bases / name, dtype=torch.float32, device_map=place), r=4, target_modules="all-linear"
        )
        make_shardable(model.get_base_model())
        layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        layouts.append({name: (layer._layout, repr(layer)) for name, layer in layers.items()})
        assert not any(buffer.is_meta for _, buffer in model.named_buffers())
        assert all(parameter.is_meta == (place == "meta") for n, parameter in model.named_parameters() if "words" in n)
    assert layouts[0] == layouts[1]


@pytest.fixture(scope="module")
def ranks(bases, tmp_path_factory) -> list[dict]:
    results = tmp_path_factory.mktemp("ranks")
    launch(Path(__file__).with_name("sharded_ranks.py"), bases, results)
    return [json.loads((results / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_each_would_alone(ranks, case):
    bar = 0.02 if case == "bfloat16" else 1e-5
    for found in (rank[case] for rank in ranks):
        assert found["same"]
        assert found["loss"] <= bar
        assert found["gradients"] <= bar
        assert found["share"] == 0.5
        assert found["saved"] == 0


def test_every_rank_is_told(ranks):
    for found in ranks:
        assert "were cast from float32 to bfloat16" in found["cast"]
        assert "rank 1 loaded another base than rank 0" in found["other base"]
        assert found["same adapter"] == "none"
        assert "rank 1 trains another adapter than rank 0: r is " in found["other adapter"]
        assert "the saved adapter is 'digest 1', there 'digest 0'" in found["other saved adapter"]
        assert "can be read only while the model runs" in found["read while sharded"]


def test_who_waits_for_a_rank_that_has_ended_is_told(ranks):
    assert "another rank ended while rank 0 waited for it" in ranks[0]["alone"]
