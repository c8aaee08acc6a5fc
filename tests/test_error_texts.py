"""An error names what was found, not what it might have been."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_base, to_old_layout

from qalora_plugin import QALoraConfig, add_adapter, load_adapter, load_base
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.opened import QuantizedCheckpoint


def renamed(base, out, change):
    """A copy of ``base`` with its tensors under other names."""
    folder = shutil.copytree(base, out)
    tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edited(folder, out, file, change):
    copy = shutil.copytree(folder, out)
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    return copy


def test_a_checkpoint_of_another_model_class_is_no_mixture_of_experts(base, tmp_path):
    other = renamed(base, tmp_path / "b", lambda name: name.replace("layers.", "blocks."))
    with pytest.raises(QALoraError, match="such linear layer") as error:
        load_base(other)
    assert "xpert" not in str(error.value)
    assert "quantises model.blocks.0." in str(error.value)
    assert "LlamaForCausalLM has no such linear layer" in str(error.value)
    assert "its own are named like model.layers.0." in str(error.value)


def test_experts_of_a_model_that_has_none_are_another_models(base, tmp_path):
    other = renamed(base, tmp_path / "b", lambda name: name.replace("0.mlp.", "0.mlp.experts.0."))
    with pytest.raises(QALoraError, match=r"experts\.0\..*Is config\.json another model's"):
        load_base(other)


def test_a_config_without_a_base_is_not_of_another(base, adapter):
    model = add_adapter(load_base(base, dtype=torch.float32), r=4, target_modules="all-linear")
    with pytest.raises(QALoraError, match="has a QALoraConfig that says nothing of its base"):
        model.add_adapter("second", QALoraConfig(r=4, target_modules=["q_proj"]))


def test_an_adapter_that_records_no_base(base, adapter, tmp_path):
    copy = edited(adapter, tmp_path / "a", "adapter_config.json", lambda c: c["qalora"].pop("base_fingerprint"))
    with pytest.raises(QALoraError, match="does not record its base") as error:
        merge(base, copy, tmp_path / "out")
    assert "None" not in str(error.value)
    with pytest.raises(QALoraError, match="does not record its base"):
        load_adapter(load_base(base), copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("qalora"), "does not say how it pools"),
        (lambda c: c["qalora"].update(format_version=9), "has format_version 9, this version of qalora reads 1"),
        (
            lambda c: c["qalora"].update(pooling="mean"),
            "has pooling 'mean', expected 'sum': it would be scaled wrongly",
        ),
        (lambda c: c.pop("peft_type"), "is an adapter without peft_type"),
        (lambda c: c.update(peft_type="LORA"), "is a PEFT LORA adapter with use_qalora"),
    ],
)
def test_configs_of_adapters(adapter, tmp_path, change, message):
    with pytest.raises(QALoraError, match=message):
        AdapterFolder.open(edited(adapter, tmp_path / "a", "adapter_config.json", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.pop("quantization_config"),
            r"it holds model\S+qweight, but config.json has no quantization_config",
        ),
        (
            lambda c: c.update(quantization_config="gptq"),
            "quantization_config in config.json is 'gptq', expected an obj",
        ),
        (lambda c: c["quantization_config"].pop("quant_method"), "its quantization_config names no quant_method"),
        (lambda c: c["quantization_config"].update(quant_method="awq"), "its quant_method is 'awq', expected 'gptq'"),
        (lambda c: c["quantization_config"].update(bits=8), "is stored at 4 bits, its quantisation config says 8"),
        (
            lambda c: c["quantization_config"].update(group_size=64),
            r"is stored with group size 32 \(4 groups\), its quantisation config says 64",
        ),
        (lambda c: c["quantization_config"].update(group_size=48), "group size 48 does not divide in_features 128"),
    ],
)
def test_configs_of_bases(base, tmp_path, change, message):
    with pytest.raises(QALoraError, match=message):
        QuantizedCheckpoint.open(edited(base, tmp_path / "b", "config.json", change))


def test_offsets_beyond_float16_and_beyond_float32(base, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "a")
    for factor, dtype, remedy in (
        (1e6, "float16", "Use offset_dtype float32"),
        (1e30, "float32", "The training diverged"),
    ):
        tensors = {name: tensor * factor for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
        save_file(tensors, copy / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(QALoraError, match=rf"exceed what {dtype} can hold\. {remedy}") as error:
            merge(base, copy, tmp_path / dtype, dtype, progress=False)
        assert "offset_dtype" not in str(error.value) or dtype == "float16"


def test_an_old_base_names_its_own_settings(tmp_path):
    base = to_old_layout(make_base(tmp_path / "base"))
    settings = json.loads((base / "quantize_config.json").read_text())
    (base / "quantize_config.json").write_text(json.dumps(settings | {"bits": 3}))
    with pytest.raises(QALoraError, match="is stored at 4 bits, its quantisation config says 3"):
        QuantizedCheckpoint.open(base)
