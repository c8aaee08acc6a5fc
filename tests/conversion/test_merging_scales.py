"""Merging trained scales: exact, composing, and the same everywhere they are read."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base
from transformers import AutoModelForCausalLM

from qalora_plugin import load_base
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.commands.inspecting import inspect
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.conversion.merging import is_merge_of, merge
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval import logits
from qalora_plugin.eval.verifying import verify
from qalora_plugin.formats.opened import QuantizedCheckpoint

SEQUENCES = [list(range(4, 100)), list(range(60, 4, -1))]
KINDS = [{}, {"act_order": True, "shards": 2}, {"group_size": -1, "bias": True}, {"bits": 3, "sym": True}]
MODULE = "model.layers.1.mlp.up_proj"


def check(base, adapter, merged):
    return verify(base, adapter, merged, SEQUENCES, device="cpu", progress=False)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A base, an adapter with scales, their merge, an adapter on that and its merge."""
    folder = tmp_path_factory.mktemp("chain")
    make_base(folder / "base")
    make_adapter(folder / "base", folder / "first", std=0.1, scales=True)
    merge(folder / "base", folder / "first", folder / "once", progress=False)
    make_adapter(folder / "once", folder / "second", seed=1, std=0.1, scales=True, target_modules=["up_proj", "q_proj"])
    merge(folder / "once", folder / "second", folder / "twice", progress=False)
    return folder


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("offset_dtype", ["float16", "float32"])
def test_merged_equals_base_plus_adapter(tmp_path, kind, offset_dtype):
    base = make_base(tmp_path / "base", **kind)
    adapter = make_adapter(base, tmp_path / "adapter", std=0.1, scales=True, rank_pattern={"up_proj": 2})
    merge(base, adapter, tmp_path / "out", offset_dtype, progress=False)
    report = check(base, adapter, tmp_path / "out")
    assert report.passed, report
    assert report.weight_error_relative < (1e-3 if offset_dtype == "float16" else 1e-7)


@pytest.mark.parametrize("std", [1e-2, 2e-3])
def test_changes_that_float16_has_no_digits_for_are_stored_in_float32(tmp_path, std):
    """As a short run at a low rate leaves them: D·C some 1e-5 of scales of 1e-2."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", std=std, scales=True)
    merge(base, adapter, tmp_path / "out", progress=False)
    assert Checkpoint.open(tmp_path / "out").tensors[f"{MODULE}.scales_delta"].dtype == "F32"
    assert check(base, adapter, tmp_path / "out").passed
    assert is_merge_of(tmp_path / "out", base, adapter, None)


def test_changes_that_float16_can_hold_are_stored_in_it(chain):
    assert Checkpoint.open(chain / "once").tensors[f"{MODULE}.scales_delta"].dtype == "F16"


def test_scales_delta_is_the_definition(chain):
    adapter, merged = AdapterFolder.open(chain / "first"), Checkpoint.open(chain / "once")
    scales = QuantizedCheckpoint.open(chain / "base").weight(MODULE).scales
    expected = reference.adapter_scales(scales, *map(torch.from_numpy, adapter.scale_factors(MODULE)))
    assert torch.equal(merged.tensor(f"{MODULE}.scales_delta"), expected.half())
    weight = QuantizedCheckpoint.open(chain / "once").weight(MODULE)
    assert torch.equal(weight.scales, scales.float() + expected.half().float())


def test_two_merges_compose(chain):
    """The second adapter trained on the first's scales; what is stored is one difference from the base's."""
    once, twice = (QuantizedCheckpoint.open(chain / name) for name in ("once", "twice"))
    factors = AdapterFolder.open(chain / "second").scale_factors(MODULE)
    exact = once.weight(MODULE).scales.double() * (1 + torch.from_numpy(factors[0] @ factors[1]))
    rounding = 2.0**-11 * twice.files.tensor(f"{MODULE}.scales_delta").double().abs() + 2.0**-23 * exact
    assert ((twice.weight(MODULE).scales.double() - exact).abs() <= rounding).all()
    untouched = "model.layers.0.mlp.down_proj"
    for part in ("offsets", "scales_delta"):
        stored = (one.files.array(f"{untouched}.{part}") for one in (once, twice))
        assert np.array_equal(*stored)
    assert torch.equal(*(one.files.tensor(f"{MODULE}.scales") for one in (once, twice)))
    report = check(chain / "once", chain / "second", chain / "twice")
    assert report.passed, report


def test_an_adapter_without_scales_keeps_the_bases(chain, tmp_path):
    adapter = make_adapter(chain / "once", tmp_path / "a", seed=2, std=0.1)
    merge(chain / "once", adapter, tmp_path / "out", progress=False)
    first, again = (Checkpoint.open(folder) for folder in (chain / "once", tmp_path / "out"))
    names = [name for name in first.tensors if name.endswith(".scales_delta")]
    assert len(names) == 14
    assert all(np.array_equal(first.array(name), again.array(name)) for name in names)
    assert check(chain / "once", adapter, tmp_path / "out").passed


def test_version_2_only_where_scales_are(chain, tmp_path):
    def version(folder):
        return json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"]

    plain = make_adapter(chain / "base", tmp_path / "plain")
    merge(chain / "base", plain, tmp_path / "merged", progress=False)
    assert (version(tmp_path / "merged"), version(chain / "once"), version(chain / "twice")) == (1, 2, 2)
    assert is_merge_of(chain / "once", chain / "base", chain / "first", None)
    assert "(scales + scales_delta)" in (chain / "once" / "README.md").read_text()
    assert inspect(chain / "once").with_changed_scales == 14
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(QALoraError, match=r"format_version is 2, but it holds no \.scales_delta"):
        QuantizedCheckpoint.open(tmp_path / "merged")


def test_transformers_loads_and_saves_it(chain, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(chain / "once", dtype=torch.float32)
    layer = model.get_submodule(MODULE)
    weight = QuantizedCheckpoint.open(chain / "once").weight(MODULE)
    assert torch.equal(layer.dense_weight(), reference.dequantize(weight, torch.float32))
    model.save_pretrained(tmp_path / "again")
    first, again = (Checkpoint.open(folder) for folder in (chain / "once", tmp_path / "again"))
    for name in first.tensors:
        assert torch.equal(first.tensor(name), again.tensor(name)), name
        assert first.tensors[name].dtype == again.tensors[name].dtype or "proj" not in name


def edit(folder, change):
    tensors = load_file(folder / "offsets.safetensors")
    change(tensors)
    save_file(tensors, folder / "offsets.safetensors", metadata={"format": "pt"})


def test_wrong_scales_are_found(chain, tmp_path, monkeypatch):
    merged = merge(chain / "base", chain / "first", tmp_path / "m", copy=True, progress=False).folder
    stored = load_file(merged / "offsets.safetensors")[f"{MODULE}.scales_delta"].clone()
    edit(merged, lambda t: t[f"{MODULE}.scales_delta"][0, 3].mul_(1.03))
    assert check(chain / "base", chain / "first", merged).offset_error > 5
    edit(merged, lambda t: t[f"{MODULE}.scales_delta"].copy_(stored))
    assert check(chain / "base", chain / "first", merged).passed
    with monkeypatch.context() as patch:  # logits that no rounding explains
        patch.setattr(logits, "adapter_scales", lambda scales, d, c: 1.01 * reference.adapter_scales(scales, d, c))
        assert any("logits differ" in failure for failure in check(chain / "base", chain / "first", merged).failures)
    edit(merged, lambda t: t.pop(f"{MODULE}.scales_delta"))
    index = merged / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    del listed["weight_map"][f"{MODULE}.scales_delta"]
    index.write_text(json.dumps(listed))
    with pytest.raises(QALoraError, match=f"{MODULE} has no changed scales, but it should"):
        check(chain / "base", chain / "first", merged)


def test_no_lora_can_do_it(chain, tmp_path):
    with pytest.raises(QALoraError, match="no LoRA can do that"):
        export_lora(chain / "first", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_needs_no_torch(chain, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from qalora_plugin import merge; merge(*sys.argv[1:], progress=False); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, chain / "base", chain / "first", tmp_path / "out"], check=True)
    name = "offsets.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (chain / "once" / name).read_bytes()


def test_nan_in_scales_delta(chain, tmp_path):
    merged = merge(chain / "base", chain / "first", tmp_path / "m", copy=True, progress=False).folder
    edit(merged, lambda t: t[f"{MODULE}.scales_delta"].fill_(float("nan")))
    with pytest.raises(QALoraError, match="scales_delta holds NaN or Inf"):
        QuantizedCheckpoint.open(merged).check_values()


def test_training_on_a_merge_starts_from_its_scales(chain):
    model = load_base(chain / "once", dtype=torch.float32)
    assert model.get_submodule(MODULE).quantized.scales.dtype == torch.float32
