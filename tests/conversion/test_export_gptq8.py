"""`qalora export gptq8`: rounded as it says, losing what it says, read by stock GPTQModel."""

import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base
from support.other_formats import ROOT
from typer.testing import CliRunner

from qalora_plugin.commands.cli import app
from qalora_plugin.conversion.export_gptq8 import export_gptq8
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.reference import dequantize
from qalora_plugin.eval.requantized import measure_requantized
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.opened import QuantizedCheckpoint


def merged_of(tmp_path, scales=False, **options):
    base = make_base(tmp_path / "base", **options)
    adapter = make_adapter(base, tmp_path / "adapter", std=0.05, scales=scales)
    return merge(base, adapter, tmp_path / "merged", progress=False).folder


def rounded(dense, size):
    """To nearest in float64, ``[K, N]``: symmetric, one float16 scale a group."""
    grouped = dense.view(-1, size, dense.shape[1])
    scales = (grouped.abs().amax(1, keepdim=True) / 127).half().double()
    return ((grouped / scales).round().clamp(-128, 127) * scales).view_as(dense)


CASES = {
    "4 bit": ({}, None, 32),
    "3 bit, act-order, groups of 64": ({"bits": 3, "act_order": True}, 64, 64),
    "2 bit, shards, biases": ({"bits": 2, "group_size": 64, "shards": 3, "bias": True}, None, 64),
    "one group, partly dense": ({"group_size": -1, "dense": ("down_proj",)}, None, 64),
    "8 bit": ({"bits": 8}, 32, 32),
    "groups of 16": ({"group_size": 16}, None, 64),
    "trained scales": ({"scales": True}, None, 32),
}


@pytest.mark.parametrize("case", list(CASES))
def test_is_what_it_says(tmp_path, case):
    options, asked, size = CASES[case]
    merged = merged_of(tmp_path, **options)
    result = export_gptq8(merged, tmp_path / "out", asked, progress=False)
    before, after = QuantizedCheckpoint.open(merged), QuantizedCheckpoint.open(result.folder)
    assert result.group_size == size
    assert after.specs.keys() == before.specs.keys()
    error = weights = offsets = 0.0
    for name, spec in after.specs.items():
        assert (spec.bits, spec.group_size, spec.scale_dtype) == (8, size, "float16")
        weight, exact = before.weight(name), dequantize(before.weight(name))
        found = dequantize(after.weight(name))
        assert torch.equal(found, rounded(exact, size))
        error += (found - exact).square().sum().item()
        weights += exact.square().sum().item()
        offsets += (exact - dequantize(weight._replace(offsets=None))).square().sum().item()
    assert result.lost_of_weights == pytest.approx((error / weights) ** 0.5, rel=1e-9)
    assert result.lost_of_offsets == pytest.approx((error / offsets) ** 0.5, rel=1e-9)
    assert after.symmetric
    assert not after.act_order
    dense = [name for name in before.files.tensors if name.endswith((".weight", ".bias"))]
    assert all(torch.equal(before.files.tensor(name), after.files.tensor(name)) for name in dense)
    assert after.files.config.keys() == before.files.config.keys() - {"transformers_weights"}


def test_what_it_costs_is_measured_and_written_down(merged, tmp_path):
    result = export_gptq8(merged, tmp_path / "out", progress=False)
    assert str(result).startswith("rounding to 8 bits loses 0.5")
    card = (result.folder / "README.md").read_text()
    assert f"{result.lost_of_offsets:.2%}: ‖w8 − w'‖ / ‖offsets‖" in card
    assert "| logits | not measured |" in card
    change = measure_requantized(merged, result.folder, tokens=64)
    assert change.tokens == 64
    assert 0 < change.kl_mean < 1e-2
    assert 0 < change.largest < 0.2
    assert 0.8 < change.top1_agreement <= 1
    assert f"| logits | {change} |" in (result.folder / "README.md").read_text()
    same = measure_requantized(merged, merged, sequences=[list(range(4, 40))])
    assert (same.largest, same.top1_agreement) == (0, 1)


def test_offsets_that_are_lost(tmp_path, caplog):
    """In 8 bits a trained adapter moves weights by less than rounding them again does."""
    base = make_base(tmp_path / "base", bits=8)
    merged = merge(base, make_adapter(base, tmp_path / "a", std=0.005), tmp_path / "merged", progress=False).folder
    assert export_gptq8(merged, tmp_path / "out", progress=False).lost_of_offsets > 1
    assert "Smaller groups lose less" in caplog.text


def test_command_line(merged, tmp_path):
    done = CliRunner().invoke(app, ["export", "gptq8", str(merged), str(tmp_path / "out"), "--tokens", "40"])
    assert "14 linears, 8 bit, group size 32" in done.output
    assert "rounding to 8 bits loses 0." in done.output
    assert "logits: over 40 tokens they move by" in done.output


def test_a_base_without_offsets(base, tmp_path):
    result = export_gptq8(base, tmp_path / "out", progress=False)
    assert result.lost_of_offsets is None
    assert "offsets add" not in str(result)
    assert "| lost of what the offsets add | there are none |" in (result.folder / "README.md").read_text()


def test_a_linear_of_zeros(tmp_path):
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.scales"] = torch.zeros_like(tensors[f"{name}.scales"])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder = export_gptq8(base, tmp_path / "out", progress=False).folder
    assert not dequantize(QuantizedCheckpoint.open(folder).weight(name)).any()


@pytest.mark.e2e
def test_stock_gptqmodel_reads_it(tmp_path):
    """vLLM, which has 8-bit kernels on GPUs only, reads the same keys."""
    merged = merged_of(tmp_path, dense=("layers.1.mlp.down_proj",))
    folder = export_gptq8(merged, tmp_path / "out", progress=False).folder
    script, out = ROOT / "tests" / "support" / "gptqmodel_dense.py", tmp_path / "dense.safetensors"
    done = subprocess.run(
        [ROOT / ".venv-serve" / "bin" / "python", script, folder, out], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    opened, dense = QuantizedCheckpoint.open(folder), load_file(out)
    assert set(dense) == set(opened.specs)
    assert all(torch.equal(dequantize(opened.weight(name)).half(), dense[name]) for name in dense)


def refused(source, out, message, group_size=None, kind=Unsupported):
    with pytest.raises(kind, match=message) as error:
        export_gptq8(source, out, group_size, progress=False)
    assert "\n" not in str(error.value)
    assert not list(out.parent.glob(f"*{out.name}*"))


def test_group_sizes(tmp_path, merged):
    refused(merged, tmp_path / "out", "group_size is 16; stock kernels take 32, 64 and 128", 16)
    refused(merged, tmp_path / "out", "in_features 64, which a group size of 128 does not divide.*a smaller", 128)
    odd = make_base(tmp_path / "odd", group_size=16, hidden=48)
    refused(odd, tmp_path / "out", "in_features 48, which a group size of 32 does not divide.*gguf")


def test_what_is_no_checkpoint_for_it(tmp_path):
    base = make_base(tmp_path / "base")
    refused(base, base / "out", "inside it", kind=QALoraError)
    os.truncate(base / "model.safetensors", 5000)
    refused(base, tmp_path / "out", "truncated or damaged", kind=QALoraError)
