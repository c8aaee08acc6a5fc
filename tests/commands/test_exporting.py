"""``qalora export …`` as a user types it; what the formats hold is tested with their conversions."""

import pytest
from typer.testing import CliRunner

from qalora_plugin.commands.cli import app

ARGUMENTS = {"lora": "ADAPTER", "gguf": "MERGED", "mlx": "MERGED", "gptq8": "MERGED"}


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["export", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    return result


def test_every_format_says_what_it_takes():
    listed = run("--help").output
    for name, source in ARGUMENTS.items():
        assert name in listed
        assert source in run(name, "--help").output


def test_lora(base, adapter, tmp_path):
    lines = run("lora", adapter, tmp_path / "out", "--base", base).stdout.splitlines()
    assert lines == [f"{tmp_path}/out: 14 linears; serve it with --enable-lora --max-lora-rank 8 …"]


@pytest.mark.parametrize("tokens", [1, -5])
def test_too_few_tokens_to_compare_are_refused_before_anything_is_written(merged, tmp_path, tokens):
    said = run("gptq8", merged, tmp_path / "out", "--tokens", tokens, code=1).stderr
    assert f"--tokens is {tokens}, expected 0, or 2 and more" in said
    assert not (tmp_path / "out").exists()
