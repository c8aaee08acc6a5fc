"""Names on disk that are not the model's: loading, adapters, merging, and what an adapter records of them."""

import json
import shutil

import pytest
import torch
from families.architectures import build
from families.bases import make_base_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter
from transformers import AutoModel
from transformers.core_model_loading import WeightRenaming

from qalora_plugin import add_adapter, load_adapter, load_base, merge, verify
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.module_names import shorten, stored_name
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.transformers.loading import load_model
from qalora_plugin.layers.linear import QuantLinear

IDS = torch.arange(4, 68).view(2, 32)
ON_DISK = "language_model.model.layers.0.self_attn.q_proj"
IN_MODEL = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    return make_base_of(build("gemma3"), tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def gemma3_adapter(gemma3, tmp_path_factory):
    patterns = {"rank_pattern": {r"language_model\.layers\.1\..*up_proj": 2}, "lora_alpha": 8}
    return make_adapter(gemma3.folder, tmp_path_factory.mktemp("adapter") / "adapter", **patterns)


def test_adapter_records_both_names(gemma3, gemma3_adapter):
    recorded = json.loads((gemma3_adapter / "adapter_config.json").read_text())["qalora"]
    assert recorded["names"] == {"model.language_model": "language_model.model"}
    assert recorded["model_class"] == "Gemma3ForConditionalGeneration"
    opened = AdapterFolder.open(gemma3_adapter)
    assert opened.keys[ON_DISK] == IN_MODEL
    assert set(opened.modules) == set(gemma3.linears.values())
    assert opened.rank("language_model.model.layers.1.mlp.up_proj") == 2  # patterns are for the model's names
    assert opened.rank("language_model.model.layers.0.mlp.up_proj") == 4


def test_merge_writes_names_on_disk_and_export_the_models(gemma3, gemma3_adapter, tmp_path):
    merged = merge(gemma3.folder, gemma3_adapter, tmp_path / "merged", offset_dtype="float32", progress=False).folder
    assert f"{ON_DISK}.offsets" in Checkpoint.open(merged).tensors
    assert verify(gemma3.folder, gemma3_adapter, merged, sequences=IDS.tolist(), device="cpu", progress=False).passed
    exported = export_lora(gemma3_adapter, tmp_path / "lora", gemma3.folder).folder
    assert f"base_model.model.{IN_MODEL}.lora_A.weight" in load_file(exported / "adapter_model.safetensors")


def test_merged_model_saves_back_what_it_was_loaded_from(gemma3, gemma3_adapter, tmp_path):
    merged = merge(gemma3.folder, gemma3_adapter, tmp_path / "merged", progress=False).folder
    load_model(merged, dtype="auto").save_pretrained(tmp_path / "again")
    first, again = Checkpoint.open(merged), Checkpoint.open(tmp_path / "again")
    packed = [name for name in first.tensors if name.endswith((".qweight", ".qzeros", ".scales", ".offsets"))]
    assert packed
    for name in packed:
        assert torch.equal(first.tensor(name), again.tensor(name)), name


def test_adapters_of_older_versions_stay_loadable(base, adapter, tmp_path):
    """Their config says nothing of names or classes, and their names are those on disk."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert "names" not in config["qalora"]  # nor does a text model's of today
    del config["qalora"]["model_class"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(load_base(base), folder)
    merged = merge(base, folder, tmp_path / "merged", progress=False).folder
    assert verify(base, folder, merged, sequences=IDS.tolist(), device="cpu", progress=False).passed


@pytest.mark.parametrize("names", [[], {"a": 1}, {"model": ""}, "x"], ids=str)
def test_damaged_names_are_refused(gemma3, gemma3_adapter, tmp_path, names):
    folder = shutil.copytree(gemma3_adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["qalora"]["names"] = names
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(QALoraError, match=r"qalora.names|which the base does not quantise"):
        merge(gemma3.folder, folder, tmp_path / "merged", progress=False)


def test_text_model_alone_of_a_checkpoint_with_vision(tmp_path):
    """Qwen3.5's text class loads the same checkpoint; its adapter is verified on it, and refused on the whole model."""
    base = make_base_of(build("qwen3_5"), tmp_path)
    model = load_base(base.folder, model_class="Qwen3_5ForCausalLM", dtype=torch.float32)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    model = add_adapter(model, r=2, target_modules="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    merge(base.folder, tmp_path / "adapter", tmp_path / "merged", offset_dtype="float32", progress=False)
    report = verify(
        base.folder, tmp_path / "adapter", tmp_path / "merged", sequences=IDS.tolist(), device="cpu", progress=False
    )
    assert report.passed
    whole = load_base(base.folder)
    assert type(whole).__name__ == "Qwen3_5ForConditionalGeneration"
    with pytest.raises(QALoraError, match=r"was trained on a Qwen3_5ForCausalLM, .* Load the base as that class"):
        load_adapter(whole, tmp_path / "adapter")


def test_resized_embeddings_are_refused_in_wrappers_too(gemma3):
    model = load_base(gemma3.folder)
    model.resize_token_embeddings(130)
    with pytest.raises(QALoraError, match="resized from 128 to 130 tokens"):
        add_adapter(model, r=2, target_modules="all-linear")


def test_names_that_packed_tensors_do_not_follow_are_refused(base, tmp_path, monkeypatch):
    """A rule for ``….weight`` alone: transformers would find no qweight, and fill the layer at random."""
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("mlp.down_proj", "mlp.w2"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    from transformers import conversion_mapping

    rules = [WeightRenaming(r"mlp\.w2\.weight$", "mlp.down_proj.weight")]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", rules)
    with pytest.raises(QALoraError, match=r"down_proj.* in a way that does not suit packed weights"):
        load_base(folder)


def test_quantised_layers_that_a_class_leaves_out_are_left_out(tmp_path):
    """Layers for predicting several tokens, which transformers' DeepSeek-V3 ignores."""
    base = make_base_of(build("deepseek_v3"), tmp_path)
    tensors = load_file(base.folder / "model.safetensors")
    extra = {
        name.replace("layers.0", "layers.61"): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.0.self_attn" in name
    }
    save_file(tensors | extra, base.folder / "model.safetensors", metadata={"format": "pt"})
    model = load_base(base.folder)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == len(base.linears)


def test_headless_models_load(gemma3, gemma3_adapter, tmp_path):
    merged = merge(gemma3.folder, gemma3_adapter, tmp_path / "merged", progress=False).folder
    headless, whole = AutoModel.from_pretrained(merged, dtype=torch.float32), load_model(merged, dtype=torch.float32)
    assert torch.equal(headless(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


PARTS = st.lists(st.sampled_from(["model", "layers", "0", "mlp", "a", "b"]), min_size=1, max_size=5).map(".".join)


@given(st.dictionaries(PARTS, PARTS, max_size=8))
def test_shortened_names_say_the_same(names):
    prefixes = shorten(names)
    assert {name: stored_name(name, prefixes) for name in names} == names


def test_one_prefix_for_many_layers():
    names = {f"model.language_model.layers.{i}.mlp.up": f"language_model.model.layers.{i}.mlp.up" for i in range(90)}
    assert shorten(names) == {"model.language_model": "language_model.model"}
