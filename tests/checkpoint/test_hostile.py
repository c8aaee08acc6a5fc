"""Checkpoints and adapters of bad intent: what they say is shown, not obeyed; what is not theirs stays where it is."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from support.fabricate import make_adapter, make_base
from typer.testing import CliRunner

from qalora_plugin import load_base
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.tensors import read_header
from qalora_plugin.commands.cli import app
from qalora_plugin.commands.inspecting import inspect
from qalora_plugin.conversion.card import model_card
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError, printable
from qalora_plugin.formats.served_bits import SizeReport
from qalora_plugin.integrations.peft.loading import add_adapter, load_adapter

ESCAPES = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202etxt.exe\r\x08"


@pytest.fixture
def copies(base, adapter, tmp_path):
    """A base and an adapter of one's own."""
    return shutil.copytree(base, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_quantization(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


# What is shown


def test_printable():
    assert printable("größe [K/g, N] ± 漢字\nnext") == "größe [K/g, N] ± 漢字\nnext"
    assert printable(ESCAPES).isprintable()
    assert printable(os.fsdecode(b"\xff")).encode()  # a name that is no UTF-8 can be printed, too
    assert "\x1b" not in str(QALoraError(f"no {ESCAPES}"))
    assert len(str(QALoraError("x" * 10**6))) < 1000


@pytest.mark.parametrize("command", ["inspect", "merge", "export"])
def test_no_escape_sequence_reaches_a_terminal(copies, tmp_path, command):
    base, adapter = copies
    edit_quantization(base, quant_method=f"[bold]{ESCAPES}[/nothing]")
    arguments = {
        "inspect": ["inspect", base],
        "merge": ["merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out"],
        "export": ["export", "lora", adapter, tmp_path / "out", "--base", base],
    }[command]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(result.exception, SystemExit | None)
    assert "[bold]" in result.output.replace("\n", "")
    assert not set(ESCAPES) & set("\x1b\x07\x9b\u202e\x08") & set(result.output)


def test_markup_in_a_table_is_text(tmp_path, capsys):
    folder = make_base(tmp_path / "[red]base[/]")
    inspect(folder).print()
    assert "[/]" in capsys.readouterr().out


@pytest.mark.parametrize("name", [f"model.{ESCAPES}.weight", "x" * 5000, "a\nb"])
def test_tensors_of_such_names_are_refused(tmp_path, name):
    save_file({name: torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(QALoraError, match="which no model has") as caught:
        read_header(tmp_path / "x.safetensors")
    assert str(caught.value).isprintable()


# What is written


def test_nothing_of_a_checkpoint_becomes_yaml(base, adapter):
    """A base's name, and whatever stands in its config, ends up in the card."""
    evil = "owner/x\nlicense: mit\n---\n<script>`|\x1b[0m"
    quantization = {
        "base_model": evil, "base_fingerprint": "f", "adapter": "a", "bits": 4, "group_size": 32, "sym": True,
        "desc_act": False, "offset_dtype": "float16",
    }  # fmt: skip
    card = model_card(f"out\n---\nx: {evil}", {}, quantization, AdapterFolder.open(adapter), 1, 2, [], SizeReport(0), 0)
    _, front, body = card.split("---\n", 2)
    assert set(yaml.safe_load(front)) == {"base_model", "library_name", "tags"}
    assert yaml.safe_load(front)["base_model"] == evil
    assert "<script>" not in body
    assert "\x1b" not in card
    assert "\nlicense: mit" not in body


@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_text_in_place_of_numbers_is_refused(copies, tmp_path, key):
    base, adapter = copies
    edit_quantization(base, **{key: "4]\nlicense: mit\nx: [1"})
    with pytest.raises(QALoraError, match=f"{key} in quantization_config is .*, expected a JSON integer"):
        merge(base, adapter, tmp_path / "out", progress=False)


SECRETS = (
    "id_rsa", "server.key", "server.pem", ".env", ".git-credentials", "train.log", "trainer_state.json", "optimizer.pt",
    "training_args.bin", "credentials.json", "notes.txt", "train.py", "events.out.tfevents.1", "wandb.json",
)  # fmt: skip
OWN = (
    "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "chat_template.jinja", "preprocessor_config.json",
    "modeling_x.py", "configuration_x.py", "merges.txt", "vocab.json", "qwen.tiktoken", "spiece.model",
)  # fmt: skip


def test_what_belongs_to_the_model_is_copied_and_nothing_else(copies, tmp_path):
    base, adapter = copies
    for name in (*SECRETS, *OWN):
        (base / name).write_text("{}")
    (base / "checkpoint-10").mkdir()
    out = merge(base, adapter, tmp_path / "out", progress=False).folder
    copied = {path.name for path in out.iterdir()}
    assert copied.isdisjoint({*SECRETS, "checkpoint-10"})
    assert copied.issuperset(OWN)


def test_a_model_with_code_of_its_own_keeps_all_of_it(copies, tmp_path):
    """Its files import one another, by any name."""
    base, adapter = copies
    edit(base / "config.json", auto_map={"AutoConfig": "configuration_x.X"})
    (base / "utils.py").write_text("")
    assert (merge(base, adapter, tmp_path / "out", progress=False).folder / "utils.py").is_file()


@pytest.mark.parametrize("where", ["base", "adapter"])
def test_links_that_lead_outside_are_not_followed(copies, tmp_path, caplog, where):
    base, adapter = copies
    secret = tmp_path / "secret"
    secret.write_text("TOP SECRET")
    folder = {"base": base, "adapter": adapter}[where]
    if where == "adapter":
        shutil.copy(base / "tokenizer_config.json", adapter)
    (folder / "merges.txt").symlink_to(secret)
    (folder / "added_tokens.json").symlink_to("tokenizer_config.json")  # inside: fine
    out = merge(base, adapter, tmp_path / "out", progress=False).folder
    assert not (out / "merges.txt").exists()
    assert (out / "added_tokens.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
    assert "merges.txt is not copied into the new checkpoint: it is a link that leads out" in caplog.text


def test_the_hubs_cache_is_made_of_links(copies, tmp_path, caplog):
    base, adapter = copies
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        path.rename(blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"hash-{path.name}")
    out = merge(snapshot, adapter, tmp_path / "out", progress=False).folder
    assert (out / "tokenizer.json").is_file()
    assert not caplog.records


def test_huge_companions_stay_behind(copies, tmp_path, caplog):
    base, adapter = copies
    with open(base / "vocab.txt", "wb") as file:
        file.truncate(1 << 40)
    out = merge(base, adapter, tmp_path / "out", progress=False).folder
    assert not (out / "vocab.txt").exists()
    assert "vocab.txt is not copied" in caplog.text


# What is read

HANGS = [
    "(a+)+$",
    "(.*)*x",
    ".*.*.*.*.*.*.*.*x",
    "(x?)" * 30,
    "(a|a)" * 30,
    "(?=(a+)+)b",
    r"(a)\1",
    "a?" * 40 + "a" * 40,
]


@pytest.mark.parametrize("pattern", HANGS)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"])
def test_patterns_that_could_match_for_ever_are_refused(copies, tmp_path, field, pattern):
    """Ours matches the first two, PEFT all of them: refused before either begins."""
    base, adapter = copies
    edit(adapter / "adapter_config.json", **{field: {pattern: 4} if field.endswith("pattern") else pattern})
    start = time.monotonic()
    for use in (
        lambda: merge(base, adapter, tmp_path / "out", progress=False),
        lambda: load_adapter(load_base(base), adapter),
    ):
        with pytest.raises(QALoraError, match=f"{field} holds .*, which could take for ever to match"):
            use()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "pattern",
    ["v_proj", "self_attn.v_proj", r"layers\.(0|1)\..*v_proj", r"^model\.layers\.\d+\.self_attn\.v_proj", "[vq]_proj"],
)
def test_patterns_of_ordinary_adapters_are_read_as_peft_reads_them(base, tmp_path, pattern):
    adapter = make_adapter(base, tmp_path / "adapter", rank_pattern={pattern: 2})
    opened = AdapterFolder.open(adapter)
    assert opened.rank("model.layers.1.self_attn.v_proj") == 2
    assert opened.rank("model.layers.1.self_attn.o_proj") == 4
    merge(base, adapter, tmp_path / "out", progress=False)


def test_what_no_merge_would_read_is_not_trained_either(base):
    with pytest.raises(QALoraError, match=r"rank_pattern holds .*, which could take for ever to match"):
        add_adapter(load_base(base), r=4, target_modules="all-linear", rank_pattern={"(a+)+$": 2})


WITHOUT_PRIVILEGES = """
import ctypes, os, sys
header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, nothing) == 0  # root, too, is then asked for permissions
from qalora_plugin.commands.cli import app
app()
"""


@pytest.mark.parametrize(
    "where", ["base", "base/model.safetensors", "base/config.json", "adapter/adapter_model.safetensors", "."]
)
def test_without_permission(copies, tmp_path, where):
    """One line from the command, no traceback."""
    base, adapter = copies
    closed = tmp_path / where
    command = ["merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "out"]
    closed.chmod(0o555 if where == "." else 0)
    try:
        done = subprocess.run([sys.executable, "-c", WITHOUT_PRIVILEGES, *command], capture_output=True, text=True)
    finally:
        closed.chmod(0o755)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Permission denied" in done.stderr
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_are_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(QALoraError):
        Checkpoint.open(tmp_path / "a")
    with pytest.raises(QALoraError, match="Write the folder out"):
        Checkpoint.open("~nobody-of-this-name/base")
