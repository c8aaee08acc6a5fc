"""``qalora …`` as a user types it."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import entry_points

import click
import pytest
from safetensors.torch import load_file, save_file
from support.fabricate import make_base
from support.merged_checkpoints import quantize_head
from typer.testing import CliRunner

from qalora_plugin.commands.cli import app
from qalora_plugin.commands.inspecting import inspect, made_of
from qalora_plugin.eval.tables import print_facts

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_merge_and_verify(base, adapter, tmp_path):
    out = tmp_path / "out"
    result = run("merge", "--base", base, "--adapter", adapter, "--out", out)
    assert "14 linears merged" in result.output
    assert "linked" in result.output
    result = run("verify", "--base", base, "--adapter", adapter, "--merged", out, "--tokens", 300, "--json")
    report = json.loads(result.stdout[result.stdout.index("{") :])
    assert report["passed"]
    assert report["tokens"] == 300
    result = run("verify", "--base", base, "--adapter", adapter, "--merged", out, "--tokens", 64)
    assert "PASSED" in result.output


def test_cards_carry_the_proof(base, adapter, tmp_path):
    """Of a merge with ``--verify``, of one that is verified later, and of a second verification."""
    arguments = ("--base", base, "--adapter", adapter)
    result = run("merge", *arguments, "--out", tmp_path / "a b")
    assert (
        f"not verified yet: qalora verify --base {base} --adapter {adapter} --merged '{tmp_path}/a b'" in result.output
    )
    card = tmp_path / "a b" / "README.md"
    assert "not measured yet: `qalora verify --base BASE" in card.read_text()
    for tokens in (64, 32):
        run("verify", *arguments, "--merged", tmp_path / "a b", "--tokens", tokens)
        assert card.read_text().count("exactness") == 1
        assert "verified: 63 of 63 base tensors byte-identical; offsets within" in card.read_text()
        assert f"over {tokens} tokens in float32" in card.read_text()
    assert "PASSED" in run("merge", *arguments, "--out", tmp_path / "c", "--verify").output
    assert "| exactness | verified" in (tmp_path / "c" / "README.md").read_text()


def test_a_card_of_somebody_elses_stays(base, adapter, merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "m")
    (folder / "README.md").write_text("# My model\n")
    run("verify", "--base", base, "--adapter", adapter, "--merged", folder, "--tokens", 32)
    assert (folder / "README.md").read_text() == "# My model\n"
    (folder / "README.md").unlink()
    run("verify", "--base", base, "--adapter", adapter, "--merged", folder, "--tokens", 32)
    assert not (folder / "README.md").exists()


def test_the_cards_first_lines_say_what_is_needed(merged):
    head = (merged / "README.md").read_text().split("---")[2].strip().splitlines()[:6]
    assert "install the `qalora` package" in " ".join(head)
    assert "transformers at the missing file" in " ".join(head)


@pytest.mark.parametrize("place", ["base", "merged"])
def test_merge_writes_neither_into_its_base_nor_where_it_cannot(base, adapter, tmp_path, place):
    own = shutil.copytree(base, tmp_path / "base")
    out, match = {"base": (own / "out", "inside it"), "merged": ("/proc/out", "/proc is not writable")}[place]
    assert match in run("merge", "--base", own, "--adapter", adapter, "--out", out, code=1).stderr


def test_merge_says_what_vllm_will_not_serve(tmp_path, caplog):
    from support.fabricate import make_adapter, make_base

    mixed = make_base(tmp_path / "base", dense=("q_proj",))
    adapter = make_adapter(mixed, tmp_path / "adapter")
    run("merge", "--base", mixed, "--adapter", adapter, "--out", tmp_path / "out")
    assert "vLLM runs q_proj, k_proj, v_proj as one layer" in caplog.text
    assert "q_proj (dense)" in caplog.text


def test_errors_are_one_line(base, tmp_path):
    result = run("merge", "--base", base, "--adapter", tmp_path / "none", "--out", tmp_path / "out", code=1)
    assert result.stderr.startswith("error: the adapter folder")
    assert "Traceback" not in result.output


def test_failed_verification_exits_with_1(base, merged, tmp_path):
    from support.fabricate import make_adapter

    other = make_adapter(base, tmp_path / "other", seed=2)
    run("verify", "--base", base, "--adapter", other, "--merged", merged, "--tokens", 64, code=1)


def test_a_revision_of_a_folder(base, adapter, merged):
    arguments = ("--base", base, "--adapter", adapter, "--merged", merged, "--revision", "main")
    assert "--revision main is of a Hub id" in run("verify", *arguments, code=1).stderr


@pytest.mark.parametrize(
    "command",
    [
        "merge --base {base} --adapter {adapter} --out {out}",
        "quantize {base} {out} --dataset text.txt",
        "export lora {adapter} {out} --base {base}",
        "import peft {adapter} {out} --base {base}",
        "import official {adapter} {out} --base {base}",
    ],
)
def test_a_revision_of_a_folder_changes_nothing_anywhere(command, base, adapter, tmp_path):
    out = tmp_path / "out"
    arguments = command.format(base=base, adapter=adapter, out=out).split()
    assert "--revision main is of a Hub id" in run(*arguments, "--revision", "main", code=1).stderr
    assert not out.exists()


def test_a_missing_folder_is_named_as_it_was_written(base, adapter, tmp_path):
    for arguments in (
        ("export", "mlx", "nope", tmp_path / "x"),
        ("export", "gptq8", "nope", tmp_path / "x"),
        ("verify", "--base", base, "--adapter", adapter, "--merged", "nope"),
    ):
        assert run(*arguments, code=1).stderr.startswith("error: 'nope' is no local folder")


def test_unknown_dtype(base, adapter, merged):
    result = run("verify", "--base", base, "--adapter", adapter, "--merged", merged, "--dtype", "int4", code=1)
    assert "--dtype is 'int4', expected float32" in result.stderr


def test_inspect(base, merged, tmp_path):
    report = json.loads(run("inspect", base, "--rank", 8, "--json").stdout)
    assert report["can_be_base"]
    assert report["quantised"] == 14
    assert report["kinds"] == ["14 × 4 bit, g 32"]
    assert report["dense"] == ["lm_head", "model.embed_tokens"]
    one_layer = 2 * (2 + 64) + 2 * (2 + 32) + 2 * (2 + 128) + (4 + 64)
    assert report["trainable_parameters"] == 2 * 8 * one_layer
    assert "can be a base" in run("inspect", base).output
    report = json.loads(run("inspect", merged, "--json").stdout)
    assert report["can_be_base"]
    assert report["with_offsets"] == 14
    result = run("inspect", "owner/model", code=1)
    assert "hf download owner/model" in result.stderr


def test_what_was_made_is_counted_as_inspect_counts_it(tmp_path):
    """In act-order the column's group is stored, too: quantize printed less."""
    base = make_base(tmp_path / "base", act_order=True)
    assert made_of(base).endswith(inspect(base).served)
    assert "order" in made_of(base)


def test_inspect_a_dense_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    ).save_pretrained(tmp_path / "dense")
    report = json.loads(run("inspect", tmp_path / "dense", "--json").stdout)
    assert report["quant_method"] is None
    assert "it is dense" in report["why_not"]


def test_quantize_without_gptqmodel_says_how_to_get_it(tmp_path):
    result = run("quantize", tmp_path, tmp_path / "out", "--dataset", tmp_path / "x.txt", code=1)
    assert "GPTQModel is not installed here" in result.stderr
    assert "pip install --no-build-isolation gptqmodel" in result.stderr
    result = run("quantize", tmp_path, tmp_path / "out", "--dataset", "x.txt", "--bits", 5, code=1)
    assert "bits is 5, expected one of (2, 3, 4, 8)" in result.stderr


def test_axolotl_finds_the_command():
    (point,) = [p for p in entry_points(group="axolotl.cli_commands") if p.name == "qalora"]
    assert isinstance(point.load(), click.Command)


@pytest.mark.parametrize("module", ["qalora_plugin", "vllm_ext"])
def test_import_needs_neither_axolotl_nor_vllm(module):
    code = (
        f"import sys; import {module}; print([m for m in ('axolotl', 'peft', 'vllm', 'gptqmodel') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_merge_imports_neither_transformers_nor_peft(base, adapter, tmp_path):
    """They take longer to import than a small model takes to merge."""
    code = """
import atexit, sys
heavy = ("transformers", "peft", "huggingface_hub", "torch._dynamo")
atexit.register(lambda: print([name for name in heavy if name in sys.modules]))
from qalora_plugin.commands.cli import app
from qalora_plugin.eval.tables import print_facts
app()
"""
    arguments = ["merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "14 linears merged" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("merge", "--base", "{base}", "--adapter", "", "--out", "{out}"), "--adapter"),
        (("merge", "--base", "{base}", "--adapter={out}", "--out="), "--out"),
        (("inspect", ""), "an argument"),
        (("export", "mlx", "{base}", " "), "an argument"),
        (("eval", "{base}", "--jsonl", "", "--generate", "1"), "--jsonl"),
        (("eval", "{base}", "--answer-pattern", " "), "--answer-pattern"),
    ],
)
def test_variables_of_the_shell_that_are_unset(base, adapter, tmp_path, monkeypatch, arguments, option):
    """An empty path was the working directory: a merge of whatever adapter lay there."""
    monkeypatch.chdir(adapter)
    given = [text.format(base=base, out=tmp_path / "out") for text in arguments]
    assert f"{option} is empty" in run(*given, code=1).stderr
    assert not (tmp_path / "out").exists()


def test_the_home_where_shells_leave_it(base, adapter, merged, tmp_path, monkeypatch):
    """``--merged=~/m``: the proof passed, and its card stayed without it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(merged, tmp_path / "m")
    run("verify", f"--base={base}", f"--adapter={adapter}", "--merged=~/m", "--tokens", 32)
    assert "| exactness | verified" in (tmp_path / "m" / "README.md").read_text()
    assert "logits: over 32 tokens" in run("export", "gptq8", "~/m", "~/g8", "--tokens", 32).output
    assert "over 32 tokens" in (tmp_path / "g8" / "README.md").read_text()
    assert "m cannot be" not in run("inspect", "~/m").output


def test_inspect_says_what_is_there_instead(base, adapter, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert (
        "is a GGUF file. Make a base of it: qalora import gguf"
        in run("inspect", tmp_path / "model.gguf", code=1).stderr
    )
    assert "Pass the folder that holds config.json" in run("inspect", base / "config.json", code=1).stderr
    assert "does not exist" in run("inspect", tmp_path / "nope", code=1).stderr
    beside = shutil.copytree(adapter, tmp_path / "run")  # as training runs leave it
    shutil.copy(base / "config.json", beside)
    for folder in (adapter, beside):
        assert "is an adapter's folder" in run("inspect", folder, code=1).stderr


def test_inspect_of_what_does_not_load(tmp_path):
    """It said yes, and training no."""
    half = make_base(tmp_path / "half")
    tensors = load_file(half / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers.1." not in name}
    save_file(kept, half / "model.safetensors", {"format": "pt"})
    report = json.loads(run("inspect", half, "--json").stdout)
    assert not report["can_be_base"]
    assert "has no model.layers.1" in report["why_not"]
    tied = make_base(tmp_path / "tied")
    quantize_head(tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "shares between layers" in json.loads(run("inspect", tied, "--json").stdout)["why_not"]


def test_facts_are_whole_in_a_narrow_terminal(monkeypatch, capsys):
    """A proof's hash was cut off at 80 columns, in every log."""
    monkeypatch.setenv("COLUMNS", "60")
    print_facts("proof", [("sha256", "7" * 64)])
    assert capsys.readouterr().out.count("7") == 64
