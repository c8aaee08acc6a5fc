"""Damaged and foreign checkpoints: one clear error each."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_base

from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.tensors import all_finite, is_finite, read_array, read_header
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.gptq import is_act_order
from qalora_plugin.formats.opened import QuantizedCheckpoint


@pytest.fixture
def copy(base, tmp_path):
    """A private copy of the base, single shard."""
    return shutil.copytree(base, tmp_path / "copy")


@pytest.fixture
def sharded(tmp_path):
    return make_base(tmp_path / "sharded", shards=3)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def open_base(folder):
    QuantizedCheckpoint.open(folder).check_values()


def refuse(folder, match):
    with pytest.raises(QALoraError, match=match):
        open_base(folder)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_facts_are_read_off_the_tensors(tmp_path, checkpoint_format, group_size, sym, act_order):
    folder = make_base(
        tmp_path / "m", group_size=group_size, sym=sym, checkpoint_format=checkpoint_format, act_order=act_order
    )
    source = QuantizedCheckpoint.open(folder)
    source.check_values()
    assert len(source.specs) == 14
    module = source.specs["model.layers.0.mlp.down_proj"]
    assert (module.in_features, module.out_features, module.bits) == (128, 64, 4)
    assert module.group_size == (128 if group_size == -1 else group_size)
    assert is_act_order(module, source.files.array) == (act_order and group_size != -1)
    assert source.format.is_symmetric(module, source.files.array) == sym


def test_dense(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    refuse(copy, r"it holds .*qweight, but config.json has no quantization_config")
    edit_tensors(copy, lambda t: [t.pop(name) for name in list(t) if name.endswith(".qweight")])
    refuse(copy, r"it is dense .* qalora quantize")


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_other_quantization(copy, method):
    edit_config(copy, quant_method=method)
    refuse(copy, f"quant_method is '{method}', expected 'gptq'")


def test_mlx_under_both_of_its_keys(copy):
    """mlx-lm writes the same under another key, too, without a method: it was called dense."""
    config = json.loads((copy / "config.json").read_text())
    settings = {"group_size": 64, "bits": 4}
    del config["quantization_config"]
    for more in ({}, {"quantization_config": settings}):
        (copy / "config.json").write_text(json.dumps(config | {"quantization": settings} | more))
        refuse(copy, "its quant_method is 'mlx', expected 'gptq'")


def test_a_merged_checkpoint_is_a_base(merged):
    source = QuantizedCheckpoint.open(merged)
    source.check_values()
    assert source.has_offsets
    assert all(spec.offset_dtype == "float16" for spec in source.specs.values())


def test_unknown_format_version(merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "m")
    edit_config(folder, format_version=4)
    with pytest.raises(QALoraError, match="format_version is 4, this version of qalora reads 1"):
        QuantizedCheckpoint.open(folder)


def test_unknown_zero_storage(copy):
    edit_config(copy, checkpoint_format="marlin")
    refuse(copy, "checkpoint_format is 'marlin', expected one of gptq, gptq_v2")


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuse(sharded, "the shard model-00002-of-00003.safetensors is missing")


def test_shard_that_shrinks_after_it_was_opened(copy):
    """What is no longer there must not be read as zeros."""
    checkpoint = Checkpoint.open(copy)
    name, info = max(checkpoint.tensors.items(), key=lambda item: item[1].end)
    with open(copy / info.file, "r+b") as file:
        file.truncate(info.end - 1)
    with pytest.raises(QALoraError, match="truncated or damaged"):
        checkpoint.tensor(name)
    with pytest.raises(QALoraError, match="truncated or damaged"):
        list(checkpoint.read(name, [(0, info.end - info.start)]))


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_shard(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(copy, "model.safetensors is truncated or damaged")


def test_index_names_an_absent_tensor(sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    refuse(sharded, "holds the tensor 'model.ghost.weight', but it does not")


@pytest.mark.parametrize("part", ["g_idx", "qzeros", "bias"])
def test_part_of_a_linear_that_the_index_does_not_list(tmp_path, part):
    """transformers takes what a shard holds, a merge what the index lists: columns were read in another order."""
    folder = make_base(tmp_path / "base", shards=2, act_order=True, bias=True)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = f"model.layers.0.mlp.up_proj.{part}"
    index["weight_map"].pop(name)
    path.write_text(json.dumps(index))
    refuse(folder, f"model.safetensors.index.json does not list {name}, which model-0000.-of-00002.safetensors holds")


def test_tensors_of_other_modules_that_the_index_does_not_list(sharded):
    """Such as old ``rotary_emb.inv_freq``: nobody needs them."""
    path = sharded / "model-00001-of-00003.safetensors"
    save_file(load_file(path) | {"model.other.inv_freq": torch.ones(4)}, path, {"format": "pt"})
    open_base(sharded)
    assert "model.other.inv_freq" not in Checkpoint.open(sharded).tensors


@pytest.mark.parametrize("backwards", [False, True])
def test_a_tensor_in_two_shards(sharded, backwards):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict(sorted(index["weight_map"].items(), key=lambda item: item[1], reverse=backwards))
    path.write_text(json.dumps(index))
    name = next(name for name, file in index["weight_map"].items() if "00001" in file and name.endswith("norm.weight"))
    other = sharded / "model-00003-of-00003.safetensors"
    save_file(load_file(other) | {name: torch.full((64,), 7.0).half()}, other, {"format": "pt"})
    refuse(sharded, f"both hold {name}, and readers differ")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 3])
def test_index_leaves_the_folder(sharded, file):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = file
    path.write_text(json.dumps(index))
    refuse(sharded, "inside the folder itself")


def test_pickles_are_never_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refuse(copy, r"pickled weights \(pytorch_model.bin\)")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_scales(copy, bad):
    edit_tensors(copy, lambda t: t["model.layers.0.self_attn.q_proj.scales"].view(-1)[3:4].fill_(bad))
    refuse(copy, r"q_proj.scales holds NaN or Inf")


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("qzeros", None, "the tensor qzeros is missing"),
        ("scales", lambda t: t[:-1].clone(), "qzeros .* do not fit scales"),
        ("scales", lambda t: t.int(), "scales are I32, expected a float type"),
        ("qweight", lambda t: t[:, :-1].contiguous(), "qweight .* does not fit scales"),
        ("qweight", lambda t: t.float(), "qweight is F32, expected int32 words"),
        ("g_idx", lambda t: t[:-1].clone(), "g_idx has shape"),
        ("g_idx", lambda t: torch.zeros_like(t), "does not put exactly 32 columns"),
        ("g_idx", lambda t: t + 2**30, "does not put exactly 32 columns"),
        ("g_idx", lambda t: t - 1, "does not put exactly 32 columns"),
    ],
)
def test_wrong_shapes(copy, part, change, match):
    name = f"model.layers.1.mlp.down_proj.{part}"

    def edit(tensors):
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])

    edit_tensors(copy, edit)
    refuse(copy, match)


def test_group_size_that_does_not_divide_k(copy):
    """GPTQ writes ceil(K/g) groups then."""

    def edit(tensors):
        for part in ("scales", "qzeros"):
            name = f"model.layers.0.mlp.down_proj.{part}"
            tensors[name] = tensors[name][:3].clone()

    edit_tensors(copy, edit)
    edit_config(copy, group_size=48)
    refuse(copy, "group size 48 does not divide in_features")


def test_config_at_odds_with_tensors(copy):
    edit_config(copy, bits=8)
    refuse(copy, "stored at 4 bits, its quantisation config says 8")


def test_not_a_folder(base, tmp_path):
    refuse(base / "config.json", "is a file, expected a model folder")
    refuse(tmp_path / "nowhere", "does not exist")
    refuse(tmp_path, "has no config.json")
    refuse("no-such-owner/no-such-model", "fetching it from the Hub failed")


def test_broken_config(copy):
    (copy / "config.json").write_text("{")
    refuse(copy, "config.json is not valid JSON")


def test_tensors_as_arrays(tmp_path):
    """As torch reads them; bfloat16, which numpy lacks, as float32; other dtypes are refused."""
    values = torch.tensor([[1.5, -0.0, float("inf")], [3e-39, 1e38, -7.25]])
    stored = {name: values.to(getattr(torch, name)) for name in ("float32", "float16", "bfloat16", "float8_e5m2")}
    save_file(stored | {"empty": torch.empty(0, 4), "int32": torch.arange(5).int()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for name in ("float32", "float16", "empty", "int32"):
        array = checkpoint.array(name)
        assert torch.equal(torch.from_numpy(array), checkpoint.tensor(name))
    assert torch.equal(torch.from_numpy(checkpoint.array("bfloat16")), stored["bfloat16"].float())
    with pytest.raises(QALoraError, match="holds float8_e5m2 where 16 or 32 bits are expected"):
        checkpoint.array("float8_e5m2")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_all_finite(tmp_path, dtype, bad):
    info = torch.finfo(dtype)
    values = torch.tensor([[0.0, -0.0, info.max, info.min, info.tiny]], dtype=dtype)
    for last, finite in ((1.0, True), (bad, False)):
        save_file({"t": torch.cat([values, torch.full((1, 1), last, dtype=dtype)], 1)}, tmp_path / "t.safetensors")
        stored = read_header(tmp_path / "t.safetensors")["t"]
        assert all_finite(read_array(tmp_path, stored)) == finite
        assert is_finite((tmp_path / "t.safetensors").read_bytes()[stored.start : stored.end], stored.dtype) == finite
