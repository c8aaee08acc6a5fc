"""The merge: exact, and what it writes."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base
from support.merges import SEQUENCES, UP_A, edited

from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.conversion import merging, writer
from qalora_plugin.conversion.merging import is_merge_of, merge
from qalora_plugin.core import folding, reference
from qalora_plugin.eval.verifying import verify

KINDS = [
    {},
    {"sym": True, "checkpoint_format": "gptq_v2", "group_size": 64},
    {"act_order": True, "shards": 2},
    {"group_size": -1, "bias": True},
    {"dense": ("layers.0.self_attn", "down_proj")},
    {"bits": 8, "sym": True},
    {"bits": 3},
    {"bits": 2, "store_g_idx": False},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("offset_dtype", ["float16", "float32"])
def test_merged_equals_base_plus_adapter(tmp_path, kind, offset_dtype):
    base = make_base(tmp_path / "base", **kind)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out", offset_dtype, progress=False)
    report = verify(base, adapter, tmp_path / "out", SEQUENCES, device="cpu", progress=False)
    assert report.passed, report
    assert report.tensors_identical == report.tensors
    assert report.weight_error_relative < (1e-3 if offset_dtype == "float16" else 1e-7)


def test_offsets_are_the_definition(base, adapter, merged):
    checkpoint, weights = Checkpoint.open(merged), load_file(adapter / "adapter_model.safetensors")
    module = "model.layers.1.self_attn.o_proj"
    lora_a, lora_b = (weights[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    expected = reference.adapter_offsets(lora_a, lora_b, 8 / 4)
    stored = checkpoint.tensor(f"{module}.offsets")
    assert stored.dtype == torch.float16
    assert torch.equal(stored, expected.half())


def test_format(base, merged):
    config = json.loads((merged / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "qalora"
    assert quantization["format_version"] == 1
    assert (quantization["bits"], quantization["group_size"], quantization["sym"]) == (4, 32, False)
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["model.layers.0.mlp.up_proj.offsets"] == "offsets.safetensors"
    shard = merged / "model-00001-of-00001.safetensors"
    assert shard.stat().st_ino == (base / "model.safetensors").stat().st_ino  # linked: no new bytes
    assert (merged / "tokenizer.json").is_file()
    card = (merged / "README.md").read_text()
    assert "\n| exactness | " in card
    assert "\nbase_model:" not in card  # the base is a folder, which the Hub refuses there


def test_copy_shares_nothing(base, adapter, tmp_path):
    result = merge(base, adapter, tmp_path / "out", copy=True, progress=False)
    assert not result.linked
    shard = tmp_path / "out" / "model-00001-of-00001.safetensors"
    assert shard.stat().st_nlink == 1
    assert shard.read_bytes() == (base / "model.safetensors").read_bytes()


def test_config_symmetry_is_corrected_from_the_zeros(base, adapter, tmp_path):
    """A config that says sym on asymmetric zeros would make a server ignore them."""
    folder = shutil.copytree(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (folder / "config.json").write_text(json.dumps(config))
    merge(folder, adapter, tmp_path / "out", progress=False)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sym"] is False


def test_many_offset_files(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_BYTES", 2000)
    merge(base, adapter, tmp_path / "out", progress=False)
    files = sorted(path.name for path in (tmp_path / "out").glob("offsets-*"))
    assert len(files) > 2
    assert files[0] == f"offsets-00001-of-{len(files):05d}.safetensors"
    assert verify(base, adapter, tmp_path / "out", SEQUENCES, device="cpu", progress=False).passed


def test_is_merge_of(base, adapter, merged, tmp_path):
    assert is_merge_of(merged, base, adapter, "float16")
    assert is_merge_of(merged, base, adapter, None)
    assert not is_merge_of(merged, base, adapter, "float32")
    assert not is_merge_of(merged, make_base(tmp_path / "base", layers=1), adapter, None)
    assert not is_merge_of(merged, base, make_adapter(base, tmp_path / "other", seed=3), "float16")
    assert not is_merge_of(tmp_path / "nothing", base, adapter, "float16")


def test_memory_does_not_grow_with_the_offsets(base, adapter, tmp_path, monkeypatch):
    """Pending offsets never exceed one shard: checked on what is handed to the writer."""
    monkeypatch.setattr(merging, "SHARD_BYTES", 2000)
    sizes = []
    write = writer.ShardWriter._flush
    monkeypatch.setattr(
        writer.ShardWriter,
        "_flush",
        lambda self: sizes.append(sum(tensor.nbytes for tensor in self._held.values())) or write(self),
    )
    merge(base, adapter, tmp_path / "out", progress=False)
    assert len(sizes) > 2
    assert max(sizes) <= 2000


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": 9},
        {"alpha_pattern": {"up_proj": 3}},
        {"use_rslora": True},
        {"tensors": lambda t: t[UP_A][0, :1].mul_(2)},
    ],
    ids="".join,  # the names of the fields
)
def test_merged_already_means_the_same_scaling_too(base, adapter, merged, tmp_path, change):
    change = dict(change)
    folder = edited(adapter, tmp_path / "a", change.pop("tensors", None), **change)
    assert not is_merge_of(merged, base, folder, "float16")
    same = edited(adapter, tmp_path / "b", target_modules=["renamed"], inference_mode=False)
    assert is_merge_of(merged, base, same, "float16")


@pytest.mark.parametrize("file", ["offsets.safetensors", "offsets-merged.safetensors"])
@pytest.mark.parametrize("copy", [False, True])
def test_a_shard_by_the_name_of_the_offsets(base, adapter, tmp_path, file, copy):
    """The merge writes under names that are free: through a link it would write into the base."""
    folder = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for shard, part in (("offsets.safetensors", names[::3]), (file, names[1::3]), ("x.safetensors", names[2::3])):
        weight_map |= dict.fromkeys(part, shard)
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    merge(folder, adapter, tmp_path / "out", copy=copy, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert verify(folder, adapter, tmp_path / "out", SEQUENCES, device="cpu", progress=False).passed


@pytest.mark.parametrize(("std", "told"), [(1e-5, True), (1e-4, True), (2e-2, False)])
@pytest.mark.parametrize("offset_dtype", ["float16", "float32"])
def test_what_vanishes_in_float16_is_told(base, tmp_path, caplog, std, told, offset_dtype):
    adapter = make_adapter(base, tmp_path / "adapter", std=std)
    merge(base, adapter, tmp_path / "out", offset_dtype, progress=False)
    told = told and offset_dtype == "float16"
    assert ("Merge with offset_dtype float32" in caplog.text) == told
    report = verify(base, adapter, tmp_path / "out", SEQUENCES, device="cpu", progress=False)
    assert report.passed != told
    if told:  # the figure is the one that verify finds
        assert (
            f"{report.weight_error_relative:.1e}"[:3]
            in f"{float(re.findall(r'[(]([^ ]*) of the', caplog.text)[0]):.1e}"
        )


@pytest.mark.parametrize("offset_dtype", ["float16", "float32"])
def test_a_linear_that_did_not_train_is_no_loss(base, adapter, tmp_path, caplog, offset_dtype):
    folder = edited(adapter, tmp_path / "a", lambda t: t[UP_A].zero_())
    merge(base, folder, tmp_path / "out", offset_dtype, progress=False)
    assert not caplog.records


@pytest.mark.parametrize("offset_dtype", ["float16", "float32"])
def test_the_command_needs_no_torch_and_writes_the_same(base, adapter, tmp_path, offset_dtype):
    code = "import sys; sys.modules['torch'] = None; from qalora_plugin.commands.cli import app; app()"
    command = ["merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "a", "--offset-dtype", offset_dtype]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merge(base, adapter, tmp_path / "b", offset_dtype, progress=False)
    a, b = ((tmp_path / out / "offsets.safetensors").read_bytes() for out in "ab")
    assert a == b


def test_folding_is_the_definition_rounded_once(monkeypatch):
    """Blocks that do not come out even, subnormal, huge and overflowing values included; onto nothing, onto offsets."""
    monkeypatch.setattr(folding, "_BLOCK", 5 * 96)
    generator = np.random.default_rng(0)
    lora_a = generator.standard_normal((4, 33)).astype(np.float32) * np.logspace(-9, 5, 33, dtype=np.float32)
    lora_b = generator.standard_normal((96, 4)).astype(np.float32)
    before = generator.standard_normal((33, 96)).astype(np.float32)
    added = reference.adapter_offsets(torch.from_numpy(lora_a), torch.from_numpy(lora_b), 0.5)
    for dtype in ("float16", "float32"):
        for base, expected in ((None, added), (before, added + torch.from_numpy(before).double())):
            found = folding.fold(lora_a, lora_b, 0.5, dtype, base)
            assert torch.equal(torch.from_numpy(found), expected.float().to(getattr(torch, dtype)))
    assert added.half().isinf().any()
