"""GPTQ in all its forms: versions of zero-points, settings by module, AutoRound's two exports; and who is no base."""

import importlib.util
import json
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base, quantize
from support.other_formats import ROOT, make_awq, make_packed, shapes_of

from qalora_plugin import load_base
from qalora_plugin.conversion.import_packed import import_packed as import_awq
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.reference import dequantize
from qalora_plugin.eval.verifying import verify
from qalora_plugin.formats.opened import QuantizedCheckpoint

IDS = torch.arange(4, 100).view(2, 48)


def edit(folder, **changes):
    """Change keys of ``quantization_config``; None takes one out."""
    config = json.loads((folder / "config.json").read_text())
    stated = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in stated.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights(folder):
    opened = QuantizedCheckpoint.open(folder)
    return {name: dequantize(opened.weight(name)) for name in opened.specs}


def same(found, expected):
    return all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_versions_of_zero_points_say_the_same(tmp_path, bits):
    v1 = make_base(tmp_path / "v1", bits=bits, checkpoint_format="gptq")
    v2 = make_base(tmp_path / "v2", bits=bits, checkpoint_format="gptq_v2")
    unsaid = edit(make_base(tmp_path / "old", bits=bits), checkpoint_format=None)  # AutoGPTQ says nothing
    named = edit(make_base(tmp_path / "named", bits=bits), checkpoint_format=None, format="gptq")
    expected = weights(v2)
    assert all(same(weights(folder), expected) for folder in (v1, unsaid, named))


def with_own_settings(folder):
    """GPTQModel's ``dynamic``: down_proj in 8 bits and groups of 64, layer 1's q, k, v left dense."""
    base = make_base(folder, dense=("layers.1.self_attn.q", "layers.1.self_attn.k", "layers.1.self_attn.v"))
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, (k, n) in shapes_of(base).items():
        if name.endswith("down_proj"):
            parts = quantize(torch.randn(n, k, generator=generator) * 0.2, 8, 64, False, "gptq")
            tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return edit(
        base,
        dynamic={r"+:.*down_proj": {"bits": 8, "group_size": 64}, r"-:model\.layers\.1\.self_attn\.[qkv]_proj": {}},
    )


def test_settings_by_module(tmp_path):
    base = with_own_settings(tmp_path / "base")
    specs = QuantizedCheckpoint.open(base).specs
    assert len(specs) == 11
    assert {(spec.bits, spec.group_size) for spec in specs.values()} == {(4, 32), (8, 64)}
    assert specs["model.layers.1.mlp.down_proj"].bits == 8
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged", progress=False).folder
    assert verify(base, adapter, merged, [IDS[0].tolist()], device="cpu", progress=False).passed


def test_auto_rounds_gptq_export(base, tmp_path):
    """Its ``auto_gptq`` format: GPTQ v1 with more in the config (``export_to_autogptq/export.py``)."""
    folder = edit(
        make_base(tmp_path / "b"), checkpoint_format=None, provider="auto-round", autoround_version="0.16.1",
        data_type="int", true_sequential=False, damp_percent=0.01, iters=1000, low_gpu_mem_usage=True,
        modules_in_block_to_quantize=[["mlp.down_proj", "self_attn.q_proj"]], block_name_to_quantize="model.layers",
        dynamic={r"+:.*lm_head": {"bits": 4, "group_size": 32, "sym": False}},
    )  # fmt: skip
    assert same(weights(folder), weights(base))


@pytest.fixture(scope="module")
def auto_round_linears():
    """AutoRound's packers by ``packing_format``, by path from its wheel: the package itself needs much else."""
    wheels = sorted((ROOT / ".cache").glob("auto_round-*.whl"))
    assert wheels, "no AutoRound wheel in .cache: run `make .cache/auto_round`"
    names = {
        "auto_round.utils.bit_packing": "auto_round/utils/bit_packing.py",
        "auto_round_extension.torch.qlinear_torch": "auto_round_extension/torch/qlinear_torch.py",
        "auto_round_extension.torch.qlinear_torch_zp": "auto_round_extension/torch/qlinear_torch_zp.py",
    }
    utils = types.ModuleType("auto_round.utils")
    utils.get_packing_device = lambda device: "cpu"
    sys.modules["auto_round.utils"] = utils
    with zipfile.ZipFile(wheels[0]) as archive:
        for name, path in names.items():
            found = archive.extract(path, ROOT / ".cache" / "auto_round_src")
            spec = importlib.util.spec_from_file_location(name, found)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    raw, less_one = (sys.modules[name].QuantLinear for name in list(names)[1:])
    yield {"auto_round:auto_gptq": less_one, "auto_round:gptqmodel": raw, "auto_round": raw}
    for name in ("auto_round.utils", *names):
        del sys.modules[name]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round"])
def test_reads_what_auto_round_packs(auto_round_linears, tmp_path, packing, bits):
    """Zeros ≥ 1, because less 1 it clamps a zero of 0."""
    base = make_base(tmp_path / "base")
    shapes, tensors, expected = shapes_of(base), {}, {}
    generator = torch.Generator().manual_seed(bits)
    for name, (k, n) in shapes.items():
        linear = torch.nn.Linear(k, n, bias=False)
        scales = torch.randint(1, 9, (n, k // 32), generator=generator) / 64
        zeros = torch.randint(1, 2**bits, (n, k // 32), generator=generator).float()
        codes = torch.randint(0, 2**bits, (n, k), generator=generator).float()
        linear.weight.data = (codes - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
        packed = auto_round_linears[packing](bits, 32, k, n, bias=False)
        packed.device = "cpu"
        packed.pack(linear, scales, zeros, None, device="cpu")
        tensors |= {f"{name}.{part}": getattr(packed, part).contiguous() for part in ("qweight", "qzeros", "scales")}
        expected[name] = linear.weight.data.double().t()
    rest = {
        name: tensor
        for name, tensor in load_file(base / "model.safetensors").items()
        if name.rpartition(".")[0] not in shapes
    }
    save_file(rest | tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit(base, **AUTO_ROUND, packing_format=packing, bits=bits)
    assert same(weights(base), expected)


AUTO_ROUND = {
    "quant_method": "auto-round", "checkpoint_format": None, "desc_act": None, "lm_head": None, "data_type": "int",
    "autoround_version": "0.16.1", "block_name_to_quantize": "model.layers",
}  # fmt: skip


def test_adapter_on_auto_rounds_own_checkpoint(base, tmp_path):
    own = edit(make_base(tmp_path / "own"), **AUTO_ROUND, packing_format="auto_round:auto_gptq")
    found, expected = (load_base(folder, dtype=torch.float32).eval()(IDS).logits for folder in (own, base))
    assert torch.equal(found, expected)
    adapter = make_adapter(own, tmp_path / "adapter")
    merged = merge(own, adapter, tmp_path / "merged", progress=False).folder
    assert QuantizedCheckpoint.open(merged).format.method == "qalora"
    assert verify(own, adapter, merged, [IDS[0].tolist()], device="cpu", progress=False).passed


def test_auto_rounds_settings_by_module(tmp_path):
    base = with_own_settings(tmp_path / "base")
    expected = weights(base)
    extra = {
        ".*down_proj": {"bits": 8, "group_size": 64},
        "model.layers.1.self_attn.q_proj": {"bits": 16, "act_bits": 16},
    }
    edit(base, **AUTO_ROUND, dynamic=None, packing_format="auto_round:auto_gptq", extra_config=extra)
    assert same(weights(base), expected)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged", progress=False).folder
    assert verify(base, adapter, merged, [IDS[0].tolist()], device="cpu", progress=False).passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing_format": "auto_round:auto_awq"}, r"AWQ's layout\. .* qalora import awq SRC OUT"),
        ({"packing_format": "auto_round:fp8"}, "packing_format 'auto_round:fp8', expected auto_round:auto_gptq"),
        ({"packing_format": 4}, "packing_format 4, expected"),
        ({"act_bits": 8}, r"quantizes activations \(act_bits 8\)"),
        ({"act_bits": "8"}, r"quantizes activations \(act_bits '8'\)"),
        ({"rotation_config": {"hadamard": True}}, "rotates activations"),
        ({"bits": 5}, "has 5-bit codes, expected 2, 3, 4 or 8"),
        ({"extra_config": [1]}, "dynamic in quantization_config is .*, expected a JSON object"),
    ],
    ids=str,
)
def test_what_auto_round_has_beyond_gptq(tmp_path, changes, message):
    folder = edit(make_base(tmp_path / "b"), **AUTO_ROUND | changes)
    with pytest.raises(QALoraError, match=message):
        QuantizedCheckpoint.open(folder)


@pytest.mark.parametrize("key", ["rotation", "rotation_config"])
@pytest.mark.parametrize("make", [make_base, make_awq], ids=["gptq", "awq"])
def test_weights_that_are_for_rotated_activations(tmp_path, make, key):
    """GPTQModel's ``rotation``: the inverse is applied to what goes into down_proj, which no reader here does."""
    folder = edit(make(tmp_path / "b"), **{key: "hadamard"})
    with pytest.raises(QALoraError, match=rf"rotates activations \({key} 'hadamard'\)"):
        QuantizedCheckpoint.open(folder) if make is make_base else import_awq(folder, tmp_path / "out")


def test_who_is_imported_first(tmp_path):
    with pytest.raises(QALoraError, match=r"quant_method is 'awq'.*qalora import awq SRC OUT"):
        QuantizedCheckpoint.open(make_awq(tmp_path / "awq"))
    with pytest.raises(QALoraError, match=r"is 'compressed-tensors'.*qalora import compressed-tensors SRC OUT"):
        QuantizedCheckpoint.open(make_packed(tmp_path / "packed")[0])
