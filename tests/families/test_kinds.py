"""What families do around their linears that packed ones did not survive, a test for each kind."""

import logging

import pytest
import torch
from axolotl.utils.dict import DictDefault
from families.architectures import build
from families.bases import make_base_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config
from transformers.pytorch_utils import Conv1D

from qalora_plugin import QALoraPlugin, add_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraLayer
from qalora_plugin.integrations.transformers.loading import load_model
from qalora_plugin.layers.linear import QuantLinear

IDS = torch.arange(4, 68).view(2, 32)


def adapted(model):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, QALoraLayer)
    }


def packed(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("name", ["gpt_neox", "granitemoe", "gemma3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_tensors_take_the_dtype_that_was_asked_for(tmp_path, name, dtype):
    """transformers leaves what it renames (GPT-NeoX's head, experts) in the file's float16."""
    base = make_base_of(build(name), tmp_path)
    model = load_base(base.folder, dtype=dtype)
    stock = load_model(base.dense, dtype=dtype)
    found = {
        key: tensor.dtype for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in packed(model)
    }
    wanted = {key: tensor.dtype for key, tensor in stock.state_dict().items() if key in found}
    assert wanted
    assert {key: found[key] for key in wanted} == wanted


def test_layers_kept_in_float32_stay_so(tmp_path, monkeypatch):
    base = make_base_of(build("gpt_neox"), tmp_path)
    from transformers import GPTNeoXForCausalLM

    monkeypatch.setattr(GPTNeoXForCausalLM, "_keep_in_fp32_modules_strict", ["lm_head"], raising=False)
    model = load_base(base.folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.float32  # renamed and kept
    assert model.gpt_neox.embed_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gpt_bigcode", "gpt2"])
def test_parents_that_initialize_their_linears(tmp_path, name):
    """Their ``_init_weights`` reaches for ``self.out_proj.weight``; what is theirs alone must still be made."""
    base = make_base_of(build(name), tmp_path)
    model, stock = (
        load(folder, dtype=torch.float32) for load, folder in ((load_base, base.folder), (load_model, base.dense))
    )
    buffers = dict(model.named_buffers())
    for key, buffer in stock.named_buffers():
        assert torch.equal(buffers[key], buffer), key
    assert not any("weight" in vars(module) for module in model.modules() if isinstance(module, QuantLinear))


def test_conv1d_is_a_linear(tmp_path):
    model = build("gpt2")
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    base = make_base_of(model, tmp_path)
    assert len(packed(load_base(base.folder))) == 8
    assert load_base(base.folder).transformer.h[0].attn.c_attn.out_features == 3 * 64


MLP = ["q_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets", ["all-linear", MLP, rf".*({'|'.join(MLP)})"], ids=["all", "list", "pattern"])
def test_dense_layers_beside_experts_are_adapted(tmp_path, targets):
    """PEFT takes gate, up and down of such model types for experts, and would leave 6 of 16 linears out."""
    base = make_base_of(build("deepseek_v2"), tmp_path)
    model = load_base(base.folder, dtype=torch.float32)
    wanted = {name for name in packed(model) if targets == "all-linear" or name.endswith(tuple(MLP))}
    model = add_adapter(model, r=2, target_modules=targets)
    assert adapted(model) == wanted
    assert sum(name.endswith(("gate_proj", "up_proj", "down_proj")) for name in wanted) == 6
    assert not model.peft_config["default"].target_parameters


def test_peft_goes_on_converting_other_adapters(tmp_path):
    dense = build("qwen3_moe")
    model = get_peft_model(dense, LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"]))
    assert model.peft_config["default"].target_parameters == {"gate_up_proj", "down_proj"}


def test_mamba_mixers_get_no_adapter_where_their_kernels_would_ignore_it(tmp_path, caplog):
    base = make_base_of(build("falcon_h1"), tmp_path)
    model = load_base(base.folder, dtype=torch.float32)
    quantized = packed(model)
    with caplog.at_level(logging.WARNING):
        peft_model = add_adapter(model, r=2, target_modules="all-linear")
    assert "2 targeted linears get no adapter" in caplog.text
    assert quantized - adapted(peft_model) == {f"model.layers.{i}.mamba.out_proj" for i in range(2)}
    with pytest.raises(QALoraError, match=r"match no quantised linear .* that can have an adapter .*out_proj"):
        add_adapter(load_base(base.folder), r=2, target_modules=["out_proj"])


def test_mixers_read_the_weight_that_the_layer_computes_with(tmp_path):
    base = make_base_of(build("mamba"), tmp_path)
    mixer = load_base(base.folder, dtype=torch.float32).backbone.layers[0].mixer
    x = torch.randn(3, mixer.out_proj.in_features)
    torch.testing.assert_close(x @ mixer.out_proj.weight.t(), mixer.out_proj(x), rtol=1e-5, atol=1e-5)
    assert not hasattr(mixer.in_proj, "weight")


class ClippableLinear(nn.Module):
    """As Gemma 4's vision tower has: a linear inside, by the name of those that see no pictures."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_layers_of_other_kinds_that_are_called_like_quantized_ones(base, caplog, targets):
    model = load_base(base)
    model.model.tower = nn.ModuleDict({"q_proj": ClippableLinear()})
    with caplog.at_level(logging.WARNING):
        found = adapted(add_adapter(model, r=2, target_modules=targets))
    assert {f"model.layers.{i}.self_attn.q_proj" for i in range(2)} <= found
    assert not any("tower" in name for name in found)
    assert "1 targeted layers are left dense by this base and get no adapter: q_proj" in caplog.text


def test_axolotls_all_linears_are_ours(tmp_path):
    """Axolotl goes by Linear in the names of classes, as in those of this model's layers."""
    folder = make_base_of(build("olmo_hybrid"), tmp_path).folder
    options = {"scales": None, "scales_lr_ratio": None, "shared_a": False, "init": None}
    cfg = {"adapter": "qalora", "lora_r": 2, "lora_alpha": 4, "lora_target_linear": True, "qalora": options}
    model, _ = QALoraPlugin().load_adapter(load_base(folder), DictDefault(cfg))
    every = adapted(add_adapter(load_base(folder), r=2, target_modules="all-linear"))
    assert adapted(model) == every


def test_other_layers_that_targets_match_are_left_out_aloud(base, caplog):
    with caplog.at_level(logging.WARNING):
        model = add_adapter(load_base(base), r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert "2 targeted layers are left dense by this base and get no adapter: embed_tokens, lm_head" in caplog.text
    assert adapted(model) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


def test_a_missing_vision_layer_is_not_called_an_expert(tmp_path):
    from safetensors.torch import load_file, save_file

    base = make_base_of(build("gemma3"), tmp_path)
    tensors = load_file(base.folder / "model.safetensors")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        source = f"language_model.model.layers.0.mlp.up_proj.{part}"
        tensors[f"vision_tower.blocks.0.fc.{part}"] = tensors[source].clone()
    save_file(tensors, base.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        QALoraError, match=r"quantises vision_tower.blocks.0.fc, but .* has no such linear layer \(nothing"
    ):
        load_base(base.folder)


def test_layers_that_compute_more_than_a_product_are_refused(base, monkeypatch):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaMLP.__init__

    def with_scaled(self, config):
        original(self, config)
        self.down_proj = Scaled(config.intermediate_size, config.hidden_size, bias=False)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", with_scaled)
    with pytest.raises(QALoraError, match=r"down_proj is a Scaled, which computes more than a linear layer"):
        load_base(base)


def test_models_that_do_not_continue_text_are_refused(base, tmp_path):
    import shutil

    folder = shutil.copytree(base, tmp_path / "base")
    T5Config(quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}).save_pretrained(folder)
    with pytest.raises(QALoraError, match="model_type 't5' is no model that continues text"):
        load_base(folder)
