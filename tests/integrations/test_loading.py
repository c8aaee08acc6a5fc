"""Loading through transformers: bases with ``load_base``, merged checkpoints with plain ``from_pretrained``."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_base
from support.two_processes import launch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from qalora_plugin import load_base
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.integrations.transformers.loading import register
from qalora_plugin.layers.linear import QuantLinear

IDS = torch.arange(4, 100).view(2, 48)


def dense_twin(folder):
    """The same model with dense weights, dequantised by the reference. float32."""
    checkpoint = Checkpoint.open(folder)
    config = type(load_base(folder).config).from_pretrained(folder)
    source = QuantizedCheckpoint.open(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: checkpoint.tensor(name).float() for name in checkpoint.tensors if name in model.state_dict()}
    for name in list(model.state_dict()):
        module = name.removesuffix(".weight")
        if f"{module}.qweight" in checkpoint.tensors:
            state[name] = reference.dequantize(source.weight(module)).t().float()
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"sym": True, "checkpoint_format": "gptq_v2", "group_size": 64},
        {"act_order": True, "shards": 3},
        {"group_size": -1, "bias": True},
        {"store_g_idx": False},
        {"dense": ("layers.0.self_attn", "down_proj")},
    ],
    ids=str,
)
def test_base_equals_its_dense_twin(tmp_path, kind):
    folder = make_base(tmp_path / "base", **kind)
    model = load_base(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found, expected = model(IDS).logits, dense_twin(folder)(IDS).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_folder_is_named_by_its_path(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    assert load_base(base.name).name_or_path == str(base)


def test_no_dense_weight_is_kept(base):
    model = load_base(base, dtype=torch.float32)
    names = {name for name, _ in model.named_parameters()}
    assert not any("proj" in name for name in names)
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == 14
    assert all(module.scales.dtype == torch.float16 and module.qweight.dtype == torch.int32 for module in packed)


def test_dense_layers_stay_dense(tmp_path):
    model = load_base(make_base(tmp_path / "base", dense=("layers.1.mlp",)))
    assert isinstance(model.model.layers[1].mlp.up_proj, torch.nn.Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_transformers_own_gptq_loading_is_left_alone(base):
    theirs = AUTO_QUANTIZER_MAPPING["gptq"]
    load_base(base)
    assert AUTO_QUANTIZER_MAPPING["gptq"] is theirs
    with pytest.raises(QALoraError):
        load_base("/nowhere")
    assert AUTO_QUANTIZER_MAPPING["gptq"] is theirs


def test_register_twice():
    register()
    register()


def test_merged_loads_generates_and_saves_back_bit_equal(merged, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.generate(IDS[:, :8], max_new_tokens=4, do_sample=False).shape == (2, 12)
    model.save_pretrained(tmp_path / "again")
    first, again = Checkpoint.open(merged), Checkpoint.open(tmp_path / "again")
    assert first.tensors.keys() == again.tensors.keys()
    for name in first.tensors:
        assert first.tensor(name).dtype == again.tensor(name).dtype
        assert torch.equal(first.tensor(name), again.tensor(name)), name
    assert first.quantization == again.quantization
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert torch.equal(reloaded(IDS).logits, original(IDS).logits)


def test_quantized_tensor_without_a_linear(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[f"model.layers.0.mlp.experts.0.up_proj.{part}"] = tensors[f"model.layers.0.mlp.up_proj.{part}"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QALoraError, match=r"experts.0.up_proj.* has no such linear layer"):
        load_base(folder)


def test_base_is_not_serialized_as_if_it_were_merged(base, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        load_base(base).save_pretrained(tmp_path / "out")


def test_a_class_with_a_head_of_its_own_loads_a_merged_model(merged):
    """Its head is new, as transformers says; what the checkpoint's own class has is not to be missing."""
    model = AutoModelForSequenceClassification.from_pretrained(merged, num_labels=3)
    assert model.score.weight.shape[0] == 3


def test_keywords_of_the_config(base, merged):
    """As ``from_pretrained`` takes them, of a merged checkpoint and, through a config of ours, of a base."""
    for folder in (base, merged):
        model = load_base(folder, use_cache=False, max_position_embeddings=64, dtype=torch.bfloat16)
        assert (model.config.use_cache, model.config.max_position_embeddings) == (False, 64)
        assert model.dtype == torch.bfloat16


def test_a_config_that_is_given_stays_as_it_was(base):
    config = AutoConfig.from_pretrained(base)
    before = config.to_dict()
    load_base(base, config=config)
    assert config.to_dict() == before


def test_code_of_a_models_own_is_asked_for_once(tmp_path):
    """``trust_remote_code`` and the like reach the config, too, which comes before the model."""
    folder = make_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    model = load_base(folder, trust_remote_code=True, dtype=torch.float32)
    assert type(model).__name__ == "OwnModel"
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_tensor_parallelism_of_transformers_is_refused(merged, tmp_path):
    """It left packed linears whole and gave them halves of their inputs."""
    (tmp_path / "load.py").write_text(
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.distributed.init_process_group('gloo')\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, tp_plan='auto')\n"
    )
    said = launch(tmp_path / "load.py", merged, code=1)
    assert "transformers' tensor parallelism cannot split packed linears" in said
