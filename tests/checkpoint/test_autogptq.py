"""Folders as AutoGPTQ wrote them until 2023: settings beside the config, weights under names of their own."""

import json

import pytest
import torch
from support.fabricate import make_adapter, make_base, to_old_layout

from qalora_plugin import load_base
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.commands.inspecting import inspect
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.verifying import verify

IDS = torch.arange(4, 100).view(2, 48)


@pytest.fixture(params=[{}, {"shards": 3}, {"settings_in_config": True}], ids=str)
def old(request, tmp_path):
    in_config = request.param.get("settings_in_config", False)
    return to_old_layout(make_base(tmp_path / "old", shards=request.param.get("shards", 1)), in_config)


def test_is_the_same_base(base, old):
    assert inspect(old).can_be_base
    assert inspect(old).kinds == inspect(base).kinds
    found, expected = (load_base(folder, dtype=torch.float32).eval()(IDS).logits for folder in (old, base))
    assert torch.equal(found, expected)


def test_merges_verifies_and_exports(old, tmp_path):
    adapter = make_adapter(old, tmp_path / "adapter")
    merged = merge(old, adapter, tmp_path / "merged", progress=False).folder
    assert not list(merged.glob("quantize_config.json"))
    assert [path.name for path in merged.glob("*.index.json")] == ["model.safetensors.index.json"]
    assert Checkpoint.open(merged).method == "qalora"
    assert verify(old, adapter, merged, [IDS[0].tolist()], device="cpu", progress=False).passed
    assert export_lora(adapter, tmp_path / "lora", old).modules == 14


def test_several_files_of_weights(tmp_path):
    folder = to_old_layout(make_base(tmp_path / "old"))
    weights = folder / "gptq_model-4bit-32g.safetensors"
    (folder / "gptq_model-4bit-128g.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(QALoraError, match=r"several other files of weights \(gptq_model-4bit-128g.safetensors, "):
        Checkpoint.open(folder)
    settings = folder / "quantize_config.json"
    named = json.loads(settings.read_text()) | {"model_file_base_name": "gptq_model-4bit-32g"}
    settings.write_text(json.dumps(named))
    assert Checkpoint.open(folder).files == ["gptq_model-4bit-32g.safetensors"]


def test_a_config_that_is_no_models_is_not_carried_along(old, tmp_path):
    """A planted link to some other JSON file would end up in every folder made of this one."""
    adapter = make_adapter(old, tmp_path / "adapter")
    (tmp_path / "secret.json").write_text('{"secret": "TOP"}')
    (old / "config.json").unlink()
    (old / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(QALoraError, match=r"names no model_type|dense|no quantization_config|neither"):
        merge(old, adapter, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
