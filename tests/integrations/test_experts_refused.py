"""Bases and adapters whose experts do not fit, and what a merge says of those that vLLM cannot serve."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.experts import copied, save_random

from qalora_plugin import load_adapter, load_base, merge
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.commands.inspecting import inspect
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.fusion import unservable
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.integrations.axolotl.preflight import check_axolotl


@pytest.fixture(scope="module")
def adapter(mixtral, tmp_path_factory):
    return save_random(load_base(mixtral, dtype=torch.float32), tmp_path_factory.mktemp("adapter") / "adapter")


EXPERT = "model.layers.0.mlp.experts.{}.up_proj"


def without(tensors, name):
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{part}"]


def missing(tensors):
    without(tensors, EXPERT.format(2))


def left_dense(tensors):
    without(tensors, EXPERT.format(2))
    tensors[f"{EXPERT.format(2)}.weight"] = torch.zeros(64, 64, dtype=torch.float16)


def one_too_many(tensors):
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"{EXPERT.format(4)}.{part}"] = tensors[f"{EXPERT.format(0)}.{part}"].clone()


def another_group_size(tensors):
    for part in ("qzeros", "scales"):
        tensors[f"{EXPERT.format(1)}.{part}"] = tensors[f"{EXPERT.format(1)}.{part}"][:1].clone()
    tensors[f"{EXPERT.format(1)}.g_idx"] = torch.zeros(64, dtype=torch.int32)


def unknown_name(tensors):
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"model.layers.0.mlp.experts.0.router.{part}"] = tensors[f"{EXPERT.format(0)}.{part}"].clone()


def a_layer_without(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.1.mlp.experts.")]:
        del tensors[name]


def without_router(tensors):
    del tensors["model.layers.1.mlp.gate.weight"]


def router_of_three(tensors):
    tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"][:3].clone()


def router_of_nan(tensors):
    tensors["model.layers.1.mlp.gate.weight"][2, 5] = float("nan")


def both(tensors):
    tensors[f"{EXPERT.format(2)}.weight"] = torch.zeros(64, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (a_layer_without, r"model.layers.1.mlp.experts.* at random"),
        (without_router, r"model.layers.1.mlp.gate.* at random"),
        (router_of_three, r"holds model.layers.1.mlp.gate.weight as 3×64, but Qwen3MoeForCausalLM has 4×64"),
        (router_of_nan, r"model.layers.1.mlp.gate.weight holds NaN or Inf"),
        (both, r"holds model.layers.0.mlp.experts.2.up_proj twice, quantized and dense"),
        (missing, r"1 of 4 experts of model.layers.0.mlp.experts lack .*experts.2.up_proj is missing"),
        (left_dense, r"experts.2.up_proj is left dense\): a layer's experts must be quantized all, or none"),
        (one_too_many, r"quantizes model.layers.0.mlp.experts.4.up_proj, but model.layers.0.mlp.experts has 4 experts"),
        (another_group_size, r"experts.0.up_proj has 4 bits and groups of 32, .*1.up_proj 4 bits and groups of 64"),
        (unknown_name, r"quantizes model.layers.0.mlp.experts.0.router, but experts have .*w1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_a_base_that_does_not_fit_is_refused(qwen, tmp_path, change, message):
    tensors = load_file(qwen / "model.safetensors")
    change(tensors)
    base = copied(qwen, tmp_path / "base", tensors, **({"group_size": None} if change is another_group_size else {}))
    config = {"base_model": str(base), "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
    for refuse in (load_base, lambda folder: check_axolotl(config | {"output_dir": str(tmp_path / "out")})):
        with pytest.raises(QALoraError, match=message):
            refuse(base)
    why = inspect(base).why_not
    assert why
    assert re.search(message, why)


@pytest.mark.parametrize("key", ["expert_backend", "experts_implementation", "use_scattermoe", "use_sonicmoe"])
def test_kernels_for_dense_experts_have_no_effect(qwen, tmp_path, caplog, key):
    config = {"base_model": str(qwen), "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, key: "scattermoe"}
    check_axolotl(config | {"output_dir": str(tmp_path / "out")})
    assert f"{key} has no effect on this base: its experts are packed" in caplog.text


def test_experts_that_compute_something_else_are_refused(qwen, monkeypatch):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    made = Qwen3MoeExperts.__init__

    def without_gate(self, config):
        made(self, config)
        self.has_gate = False  # as Nemotron-H's

    monkeypatch.setattr(Qwen3MoeExperts, "__init__", without_gate)
    with pytest.raises(QALoraError, match=r"Qwen3MoeExperts\) compute something else than a down projection of what"):
        load_base(qwen)


@pytest.mark.parametrize("meta", [None, "gptqmodel:7.6.0", {}, {"quantizer": 7}, {"quantizer": ["auto-round:0.9", 1]}])
def test_gate_and_up_that_nobody_tells_apart_are_refused(gpt_oss, tmp_path, meta):
    tensors = load_file(gpt_oss / "model.safetensors")
    with pytest.raises(QALoraError, match=r"GptOssExperts\), whose gate and up tools tell apart in two ways"):
        load_base(copied(gpt_oss, tmp_path / "base", tensors, meta=meta))


def test_biases_are_those_of_the_model(gpt_oss, qwen, tmp_path):
    tensors = load_file(gpt_oss / "model.safetensors")
    bias = tensors.pop(f"{EXPERT.format(2)}.bias")
    with pytest.raises(QALoraError, match=r"experts.2.up_proj.bias is missing, which the experts of this model have"):
        load_base(copied(gpt_oss, tmp_path / "without", tensors))
    tensors = load_file(qwen / "model.safetensors") | {f"{EXPERT.format(2)}.bias": bias[:64].clone()}
    with pytest.raises(QALoraError, match=r"experts.2.up_proj has a bias, which the experts of this model have no"):
        load_base(copied(qwen, tmp_path / "with", tensors))


def test_a_merge_says_beforehand_that_vllm_has_no_place_for_biases(gpt_oss, tmp_path, caplog):
    adapter = save_random(load_base(gpt_oss), tmp_path / "adapter", target_modules=["q_proj"])
    merge(gpt_oss, adapter, tmp_path / "merged", progress=False)
    assert "vLLM cannot serve quantized experts that have biases, as model.layers.0.mlp.experts.0." in caplog.text


def test_a_merge_says_beforehand_what_else_vllm_cannot_serve(mixtral, adapter, tmp_path, caplog):
    """Gate and up of other widths, by their older names, too; and classes of vLLM's own."""
    specs = QuantizedCheckpoint.open(mixtral).specs
    assert unservable(specs, config={"model_type": "mixtral"}) is None
    assert "experts of deepseek_v4 by a class of its own" in unservable(specs, config={"model_type": "deepseek_v4"})
    first = "model.layers.0.block_sparse_moe.experts.0.w1"
    wider = {name: replace(spec, bits=8) if name == first else spec for name, spec in specs.items()}
    assert "vLLM runs w1, w3 as one layer" in unservable(wider)
    config = json.loads((mixtral / "config.json").read_text())
    folder = copied(mixtral, tmp_path / "base", load_file(mixtral / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "minimax_m3_vl"}))
    merge(folder, adapter, tmp_path / "merged", progress=False)
    assert "vLLM computes the experts of minimax_m3_vl by a class of its own" in caplog.text


UP = "base_model.model.model.layers.0.mlp.experts.up_proj.lora_{}.weight"


def no_up_proj(tensors):
    for part in "AB":
        del tensors[UP.format(part)]


def three_experts(tensors):
    for part in "AB":
        tensors[UP.format(part)] = tensors[UP.format(part)][:3].clone()


def one_a(tensors):
    tensors[UP.format("A")] = tensors[UP.format("A")][0].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_up_proj, "holds the adapters of 13 modules, but 14 were trained"),
        (three_experts, r"adapts 3 experts as .*experts.2.w3, but the base has .*experts.3.w3, too"),
        (one_a, "are not those of a layer's experts"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_adapter_of_a_part_is_neither_merged_nor_loaded(mixtral, adapter, tmp_path, change, message):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    part = copied(adapter, tmp_path / "adapter", tensors, "adapter_model.safetensors")
    for refuse in (
        lambda: merge(mixtral, part, tmp_path / "merged", progress=False),
        lambda: load_adapter(load_base(mixtral), part),
    ):
        with pytest.raises(QALoraError, match=message):
            refuse()


def test_one_a_for_all_is_as_the_config_says(adapter, tmp_path):
    part = copied(
        adapter, tmp_path / "adapter", load_file(adapter / "adapter_model.safetensors"), "adapter_model.safetensors"
    )
    config = json.loads((part / "adapter_config.json").read_text())
    (part / "adapter_config.json").write_text(json.dumps(config | {"shared_a": True}))
    with pytest.raises(QALoraError, match="are not those of a layer's experts"):
        AdapterFolder.open(part)


@pytest.mark.parametrize("shape", [(10**9, 0, 2), (3, 128, 4), (4, 128, 4, 1)])
def test_an_adapter_of_other_experts_is_refused(adapter, tmp_path, shape):
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.experts.gate_proj.lora_B.weight"] = torch.empty(shape)
    with pytest.raises(QALoraError, match="are not those of a layer's experts"):
        AdapterFolder.open(copied(adapter, tmp_path / "adapter", tensors, "adapter_model.safetensors"))
