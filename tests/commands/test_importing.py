"""``qalora import …`` as a user types it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_base
from support.peft_pooled import make_peft_qalora
from typer.testing import CliRunner

from qalora_plugin.commands.cli import app

FORMATS = ("gguf", "awq", "compressed-tensors", "peft", "official")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["import", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return result


def test_every_format_says_what_it_takes():
    listed = run("--help").output
    for name in FORMATS:
        assert name in listed
        assert "SRC" in run(name, "--help").output


def test_peft(base, tmp_path):
    make_peft_qalora(base, tmp_path / "peft")
    lines = run("peft", tmp_path / "peft", tmp_path / "out", "--base", base).stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path}/out: 10 linears, rank 4; PEFT's use_qalora pooled 32 columns")
    assert lines[1].endswith(f"{base} is on your word")
    again = run("peft", tmp_path / "peft", tmp_path / "out", "--base", base, code=1)
    assert again.stderr.startswith("error: the output")
    assert "exists" in again.stderr


def test_official(base, tmp_path):
    """A base whose zeros are floats is a merge that added nothing."""
    from qalora_plugin.formats.opened import QuantizedCheckpoint

    opened = QuantizedCheckpoint.open(make_base(tmp_path / "merged"))
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    tensors |= {f"{name}.qzeros": opened.weight(name).zeros.half() for name in opened.specs}
    save_file(tensors, tmp_path / "merged" / "model.safetensors")
    line = run("official", tmp_path / "merged", tmp_path / "out").stdout
    assert line == f"{tmp_path}/out: 14 linears with float32 offsets; its float qzeros are zeros\n"
    found = QuantizedCheckpoint.open(tmp_path / "out")
    assert all(not torch.any(found.weight(name).offsets) for name in found.specs)
    assert run("official", tmp_path / "merged", tmp_path / "with", "--base", base).stdout.startswith(f"{tmp_path}/with")


@pytest.mark.parametrize("name", ["awq", "compressed-tensors"])
@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", None])
def test_another_format_than_asked_for_is_refused_by_name(tmp_path, name, method):
    if method == name:
        return
    folder = make_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = method and config["quantization_config"] | {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    error = run(name, folder, tmp_path / "out", code=1).stderr
    assert f"expected quant_method '{name}'" in error
    assert (f"quantized by {method}" if method else "is dense") in error
    assert not (tmp_path / "out").exists()
