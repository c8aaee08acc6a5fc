"""Files whose content is damaged or made up: JSON, headers, tensors, configs, texts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.json_files import read_json
from qalora_plugin.checkpoint.tensors import read_header
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.tokens import read_texts
from qalora_plugin.formats.opened import QuantizedCheckpoint


@pytest.fixture
def copies(base, adapter, tmp_path):
    """A base and an adapter of one's own."""
    return shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[" * 100_000, "is nested too deep"),
        (b'{"a":' * 100_000, "is nested too deep"),
        (b"[]", r"holds \[\], expected a JSON object"),
        (b"1" * 5000, "is not valid JSON"),
        (b"\xff\xfe\xfd", "is not valid JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
    ],
)
def test_json(tmp_path, text, match):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(QALoraError, match=match):
        read_json(tmp_path / "config.json")


def test_a_huge_config_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(QALoraError, match="that is no config"):
        read_json(tmp_path / "config.json")


def test_a_header_that_names_a_tensor_twice(tmp_path):
    entry = '"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    header = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(QALoraError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


def retype(path, name, change):
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("g_idx", lambda t: t.float(), "g_idx is F32, expected int32"),
        ("bias", lambda t: t.int(), "bias is I32, expected a float type"),
        ("bias", lambda t: t.fill_(float("nan")), "up_proj.bias holds NaN or Inf"),
        ("scales", lambda t: t[:0].clone(), "scales has shape .*, expected two dimensions"),
    ],
)
def test_tensors_of_another_type(tmp_path, part, change, match):
    base = make_base(tmp_path / "base", bias=True)
    adapter = make_adapter(base, tmp_path / "adapter")
    retype(base / "model.safetensors", f"model.layers.0.mlp.up_proj.{part}", change)
    with pytest.raises(QALoraError, match=match):
        merge(base, adapter, tmp_path / "out", progress=False)


def test_integer_adapters(copies, tmp_path):
    base, adapter = copies
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    retype(adapter / "adapter_model.safetensors", name, lambda t: t.int())
    with pytest.raises(QALoraError, match="is I32, expected a float type"):
        merge(base, adapter, tmp_path / "out", progress=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_offsets_that_are_not_finite_are_not_loaded(merged, tmp_path, bad):
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(merged, tmp_path / "merged")
    name = "model.layers.1.mlp.up_proj.offsets"
    retype(folder / "offsets.safetensors", name, lambda t: t.index_fill(0, torch.tensor([1]), bad))
    with pytest.raises(QALoraError, match=f"{name} holds NaN or Inf"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r": 0}, "r is 0, expected a positive integer"),
        ({"r": True}, "r is True, expected a positive integer"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a finite number"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is .*, expected a finite number"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected an object"),
        ({"rank_pattern": {"up_proj": "2"}}, r"rank_pattern\['up_proj'\] is '2', expected a positive integer"),
        ({"alpha_pattern": {"up_proj": []}}, r"alpha_pattern\['up_proj'\] is \[\], expected a finite number"),
        ({"use_rslora": "no"}, "use_rslora is 'no', expected a boolean"),
        ({"qalora": [1]}, r"qalora is \[1\], expected an object"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, expected a string"),
    ],
)
def test_adapter_configs(copies, change, match):
    _, adapter = copies
    edit(adapter / "adapter_config.json", **change)
    with pytest.raises(QALoraError, match=match):
        AdapterFolder.open(adapter)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.txt", b"\xff\xfe\x00", "is not UTF-8 text"),
        ("x.jsonl", b"[" * 100_000, "is not JSON lines"),
        ("x.jsonl", b"1" * 5000, "is not JSON lines"),
    ],
)
def test_texts(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QALoraError, match=match):
        read_texts(tmp_path / name)


def test_masks_that_nothing_loads_may_be_infinite(base, tmp_path):
    """-1e9 in float16, as older versions of transformers stored it in GPT-NeoX, GPT-J and GPT-Neo."""
    folder = shutil.copytree(base, tmp_path / "base")
    file = next(folder.glob("*.safetensors"))
    mask = {"model.layers.0.attention.masked_bias": torch.tensor(float("-inf"), dtype=torch.float16)}
    save_file(load_file(file) | mask, file, metadata={"format": "pt"})
    QuantizedCheckpoint.open(folder).check_dense_values()
    norm = {"model.norm.weight": torch.full((64,), float("nan"), dtype=torch.bfloat16)}
    save_file(load_file(file) | norm, file, metadata={"format": "pt"})
    with pytest.raises(QALoraError, match=r"model\.norm\.weight holds NaN or Inf"):
        QuantizedCheckpoint.open(folder).check_dense_values()
