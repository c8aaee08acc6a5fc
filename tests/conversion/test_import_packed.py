"""`qalora import awq` and `compressed-tensors`: a GPTQ v2 folder, exact, whole, and nothing where it cannot be."""

import json
import os
import random
import re
import shutil
import subprocess

import pytest
import torch
from fuzz import mutate
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, write_shards
from support.other_formats import ROOT, autoawq_packing, decompressed, make_awq, make_packed

from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.conversion.import_packed import import_packed
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.reference import dequantize
from qalora_plugin.eval.verifying import verify
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.opened import QuantizedCheckpoint

PACKED = {
    "4 bit": {},
    "asymmetric, bfloat16": {"symmetric": False, "dtype": torch.bfloat16},
    "8 bit": {"bits": 8, "group_size": 64},
    "3 bit, asymmetric": {"bits": 3, "symmetric": False},
    "2 bit, one group": {"bits": 2, "group_size": None},
    "act-order": {"act_order": True, "symmetric": False},
    "two config groups": {"other": ("down_proj", 8, 64, True)},
}


def parts_of(folder, name):
    prefix = f"{name}."
    tensors = load_file(folder / "model.safetensors")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("case", list(PACKED))
def test_compressed_tensors(tmp_path, case):
    src, schemes = make_packed(tmp_path / "src", **PACKED[case])
    result = import_packed(src, tmp_path / "out", progress=False)
    opened = QuantizedCheckpoint.open(result.folder)
    assert result.modules == len(opened.specs) == 14
    assert result.act_order == opened.act_order == (case == "act-order")
    assert result.symmetric == opened.symmetric == opened.files.quantization["sym"]
    for name, scheme in schemes.items():
        expected = decompressed(parts_of(src, name), scheme)
        assert (dequantize(opened.weight(name)).to(expected.dtype).t() - expected).abs().max() == 0
    dense_is_unchanged(src, result.folder)


def dense_is_unchanged(src, out):
    before, after = Checkpoint.open(src), Checkpoint.open(out)
    dense = [name for name in before.tensors if name.endswith((".weight", ".bias"))]
    assert dense
    assert all(torch.equal(before.tensor(name), after.tensor(name)) for name in dense)
    made = {name.rpartition(".")[2] for name in set(after.tensors) - set(dense)}
    assert made == {"qweight", "qzeros", "scales", "g_idx"}
    assert (out / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()
    config = {key: value for key, value in after.config.items() if key != "quantization_config"}
    assert config == {key: value for key, value in before.config.items() if key != "quantization_config"}


def test_settings_beside_the_config(tmp_path):
    """As AutoAWQ kept them until 2023: such a folder was called dense."""
    src = make_awq(tmp_path / "src", bias=True)
    expected = import_packed(src, tmp_path / "expected", progress=False)
    config = json.loads((src / "config.json").read_text())
    del config["quantization_config"]
    (src / "config.json").write_text(json.dumps(config))
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (src / "quant_config.json").write_text(json.dumps(settings))
    found = import_packed(src, tmp_path / "out", progress=False)
    assert (found.modules, found.symmetric) == (expected.modules, expected.symmetric)
    assert not (found.folder / "quant_config.json").exists()


def test_settings_of_fused_layers_under_vllms_names(tmp_path):
    """Which asks for ``gate_up_proj``, and would take it for one of the usual bits."""
    src, _ = make_packed(tmp_path / "src", other=("mlp", 8, 32, True))
    found = import_packed(src, tmp_path / "out", progress=False).folder
    quantization = json.loads((found / "config.json").read_text())["quantization_config"]

    def bits(layer):
        patterns = quantization["dynamic"].items()
        return next((s["bits"] for p, s in patterns if re.match(p.removeprefix("+:"), layer)), quantization["bits"])

    layer = "model.layers.1"
    assert [bits(f"{layer}.mlp.{leaf}_proj") for leaf in ("gate_up", "gate", "up", "down")] == [8] * 4
    assert [bits(f"{layer}.self_attn.{leaf}_proj") for leaf in ("qkv", "q", "k", "v", "o")] == [4] * 5


@pytest.mark.parametrize("shards", [1, 3])
def test_awq(tmp_path, shards):
    src = make_awq(tmp_path / "src", bias=True, dense=("layers.1.mlp.down_proj",))
    tensors = load_file(src / "model.safetensors")
    if shards > 1:
        (src / "model.safetensors").unlink()
        write_shards(src, tensors, shards)
    result = import_packed(src, tmp_path / "out", progress=False)
    opened = QuantizedCheckpoint.open(result.folder)
    assert opened.format.reading == "gptq_v2"
    assert opened.files.quantization["dynamic"] == {r"-:model\.layers\.1\.mlp\.down_proj$": {}}
    for name in opened.specs:
        expected = autoawq_packing().dequantize_gemm(
            *(tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")), 4, 32
        )
        assert (dequantize(opened.weight(name)).half() - expected).abs().max() == 0
    dense_is_unchanged(src, result.folder)


def test_auto_rounds_awq(tmp_path):
    """``auto_round:auto_awq``: the same tensors under AutoRound's own method."""
    plain = import_packed(make_awq(tmp_path / "awq"), tmp_path / "a", progress=False).folder
    quantization = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "sym": False}
    own = make_awq(tmp_path / "own", quantization=quantization)
    imported = import_packed(own, tmp_path / "b", progress=False).folder
    assert (imported / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_an_adapter_goes_onto_it(tmp_path):
    src, _ = make_packed(tmp_path / "src", symmetric=False)
    base = import_packed(src, tmp_path / "base", progress=False).folder
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged", progress=False).folder
    assert verify(base, adapter, merged, [list(range(4, 60))], device="cpu", progress=False).passed


@pytest.mark.e2e
def test_gptqmodel_reads_it(tmp_path):
    """Settings by module and excluded modules included: what ``dynamic`` is written for."""
    awq = make_awq(tmp_path / "awq", dense=("layers.1.mlp.down_proj",))
    packed, _ = make_packed(tmp_path / "packed", other=("down_proj", 8, 64, True))
    arguments, folders = [], []
    for src in (awq, packed):
        folders.append(import_packed(src, tmp_path / f"{src.name}-out", progress=False).folder)
        arguments += [folders[-1], tmp_path / f"{src.name}.safetensors"]
    run = [ROOT / ".venv-serve" / "bin" / "python", ROOT / "tests" / "support" / "gptqmodel_dense.py", *arguments]
    environment = os.environ | {"GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for folder, out in zip(folders, arguments[1::2], strict=True):
        opened, dense = QuantizedCheckpoint.open(folder), load_file(out)
        assert set(dense) == set(opened.specs)
        assert all(torch.equal(dequantize(opened.weight(name)).half(), dense[name]) for name in dense)


def refused(src, out, message, kind=QALoraError):
    with pytest.raises(kind, match=message) as error:
        import_packed(src, out, progress=False)
    assert "\n" not in str(error.value)
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))


def test_what_cannot_be_held(tmp_path):
    src, _ = make_packed(tmp_path / "src")
    edit(src, kv_cache_scheme={"num_bits": 8, "type": "float"})
    refused(src, tmp_path / "out", "quantizes the KV cache.*qalora quantize", Unsupported)
    edit(src, kv_cache_scheme=None, format="float-quantized", config_groups={"g": {"weights": {"num_bits": 8}}})
    refused(src, tmp_path / "out", "is stored as 'float-quantized'", Unsupported)
    refused(make_awq(tmp_path / "awq", quantization={"version": "gemv"}), tmp_path / "out", "'gemv'", Unsupported)


def test_other_methods(base, merged, tmp_path):
    refused(base, tmp_path / "out", "has quant_method 'gptq', expected one of awq, compressed-tensors.*a base as it is")
    refused(merged, tmp_path / "out", "has quant_method 'qalora'")


def resaved(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip


def test_tensors_that_an_import_does_not_know(tmp_path):
    src = make_awq(tmp_path / "src")
    resaved(src, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}))
    refused(src, tmp_path / "out", r"up_proj\.input_scale is no part of gemm that an import knows", Unsupported)


def test_padding(tmp_path):
    """36 outputs: compressed-tensors pads the zero-points' last word, AWQ's and GPTQ's words cannot."""
    src, _ = make_packed(tmp_path / "src")

    def narrow(tensors):
        name = "model.layers.0.self_attn.q_proj"
        tensors |= {f"{name}.{part}": tensors[f"{name}.{part}"][:36] for part in ("weight_packed", "weight_scale")}
        tensors[f"{name}.weight_shape"] = torch.tensor([36, 64])

    resaved(src, narrow)
    refused(src, tmp_path / "out", "q_proj has out_features 36, which is no multiple of 8.*Leave this", Unsupported)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_truncated(tmp_path, share):
    src = make_awq(tmp_path / "src")
    weights = src / "model.safetensors"
    os.truncate(weights, int(weights.stat().st_size * share))
    refused(src, tmp_path / "out", "is truncated or damaged")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return make_awq(folder / "awq"), make_packed(folder / "packed", symmetric=False, act_order=True)[0]


@pytest.mark.parametrize("seed", range(24))
def test_damage_and_bad_intentions(tmp_path, sources, seed):
    """Mutated configs, headers and values: imported, or refused in one line; nothing half written."""
    chance = random.Random(seed)
    src, out = shutil.copytree(chance.choice(sources), tmp_path / "src"), tmp_path / "out"
    damage = chance.choice([mutate.json_text, mutate.retyped, mutate.broken, mutate.values, mutate.entry])
    damage(src / ("config.json" if damage is mutate.json_text else "model.safetensors"), chance)
    refusal = None
    try:
        import_packed(src, out, progress=False)
    except QALoraError as error:
        refusal = str(error)
    if refusal is None:
        assert QuantizedCheckpoint.open(out).specs
    else:
        assert "\n" not in refusal
        assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_pickles_are_not_read(tmp_path):
    src = make_awq(tmp_path / "src")
    (src / "model.safetensors").rename(src / "pytorch_model.bin")
    refused(src, tmp_path / "out", "pickled weights")


def test_nothing_is_overwritten(tmp_path):
    src = make_awq(tmp_path / "src")
    with pytest.raises(QALoraError, match="exists"):
        import_packed(src, src, progress=False)
    before = sorted(src.iterdir())
    refused(src, src / "out", "inside it")
    assert sorted(src.iterdir()) == before


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    src = make_awq(tmp_path / "src")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(src, tmp_path / "out", "MB free")
