"""The tokenizer in a merged folder: the run's or the base's, never a mixture; the configs' token ids with it."""

import json
import shutil
import subprocess
import sys

import pytest
from support.fabricate import make_adapter, make_tokenizer
from transformers import AutoTokenizer

from qalora_plugin.conversion.merging import is_merge_of, merge
from qalora_plugin.eval.verifying import verify

NEW = {"eos_token": "~", "pad_token": "^"}
EOS, PAD = make_tokenizer().convert_tokens_to_ids(["~", "^"])


def old_base(base, folder, **generation):
    """``base`` as transformers 4 wrote it, with the files that 5 does not write."""
    shutil.copytree(base, folder)
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
    write(folder, "special_tokens_map.json", tokens)
    write(folder, "added_tokens.json", {"</s>": 2})
    write(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | generation)
    return folder


def trained(adapter, folder, tokens=NEW, **attributes):
    """``adapter`` with the tokenizer of its training run beside it."""
    shutil.copytree(adapter, folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(tokens)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def token_ids(folder, name="config.json"):
    config = json.loads((folder / name).read_text())
    return {key: value for key, value in config.items() if key.endswith("_token_id")}


def test_training_runs_tokenizer_alone(base, adapter, tmp_path):
    old = old_base(base, tmp_path / "base")
    (old / "chat_template.jinja").write_text("OLD")
    (old / "spiece.model").write_text("OLD")
    write(old, "preprocessor_config.json", {"of": "the base"})
    (old / "tokenizer_own.py").write_text("CODE = 1")
    new = trained(adapter, tmp_path / "adapter")
    out = merge(old, new, tmp_path / "out", progress=False).folder
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("~", "^", None)
    stale = {"special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "spiece.model"}
    assert stale.isdisjoint(path.name for path in out.iterdir())
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"of": "the base"}
    assert (out / "tokenizer_own.py").is_file()
    expected = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
    assert token_ids(out) == token_ids(out, "generation_config.json") == expected
    assert token_ids(old) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert is_merge_of(out, old, new, "float16")
    assert verify(old, new, out, max_tokens=64, device="cpu", progress=False).passed


def test_training_runs_processor_alone(base, adapter, tmp_path):
    old = old_base(base, tmp_path / "base")
    write(old, "preprocessor_config.json", {"of": "the base"})
    new = trained(adapter, tmp_path / "adapter", tokens={})
    write(new, "processor_config.json", {"of": "the run"})
    out = merge(old, new, tmp_path / "out", progress=False).folder
    assert json.loads((out / "processor_config.json").read_text()) == {"of": "the run"}
    assert not (out / "preprocessor_config.json").exists()


def test_without_a_tokenizer_of_the_run_the_bases_stays_whole(base, adapter, tmp_path):
    old = old_base(base, tmp_path / "base")
    out = merge(old, adapter, tmp_path / "out", progress=False).folder
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (out / name).read_bytes() == (old / name).read_bytes()
    assert token_ids(out) == token_ids(old)


@pytest.mark.parametrize(("before", "after"), [([2, 7, 8], [2, 7, 8, EOS]), ([EOS, 2], [EOS, 2])], ids=str)
def test_a_list_of_ends_keeps_the_others(base, adapter, tmp_path, before, after):
    old = old_base(base, tmp_path / "base", eos_token_id=before)
    out = merge(old, trained(adapter, tmp_path / "adapter"), tmp_path / "out", progress=False).folder
    assert token_ids(out, "generation_config.json")["eos_token_id"] == after
    assert token_ids(out)["eos_token_id"] == EOS


def test_unchanged_tokens_leave_the_configs_alone(base, adapter, tmp_path):
    """Ids that differ from the base's own tokenizer are the base's choice. And nothing is loaded to find that out."""
    old = old_base(base, tmp_path / "base", eos_token_id=[5, 6])
    new = trained(adapter, tmp_path / "adapter", tokens={}, chat_template="NEW")
    code = (
        "import sys; from qalora_plugin.conversion.merging import merge; merge(*sys.argv[1:], progress=False); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, old, new, tmp_path / "out"], check=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "NEW"
    assert token_ids(tmp_path / "out", "generation_config.json")["eos_token_id"] == [5, 6]
    assert token_ids(tmp_path / "out") == token_ids(old)


def test_tokens_that_a_tokenizer_has_unsaid_are_no_change(base, adapter, tmp_path, caplog):
    """Old tokenizer files leave tokens to their class; it is what they load to that counts."""
    old = old_base(base, tmp_path / "base", eos_token_id=5)
    (old / "special_tokens_map.json").unlink()
    write(old, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>"})
    assert AutoTokenizer.from_pretrained(old).eos_token_id == 2
    new = trained(adapter, tmp_path / "adapter", tokens={})
    out = merge(old, new, tmp_path / "out", progress=False).folder
    assert token_ids(out, "generation_config.json")["eos_token_id"] == 5
    assert not caplog.records


def test_base_without_tokenizer(base, tmp_path):
    bare = old_base(base, tmp_path / "base")
    for path in list(bare.glob("*token*")):
        path.unlink()
    adapter = make_adapter(bare, tmp_path / "bare_adapter")
    out = merge(bare, adapter, tmp_path / "neither", progress=False).folder
    assert token_ids(out) == token_ids(bare)
    out = merge(bare, trained(adapter, tmp_path / "adapter"), tmp_path / "out", progress=False).folder
    assert token_ids(out)["eos_token_id"] == EOS


def test_a_token_beyond_the_vocabulary_is_not_for_the_config(base, adapter, tmp_path, caplog):
    """transformers cannot build an embedding whose padding index it does not have."""
    new = trained(adapter, tmp_path / "adapter", tokens={"eos_token": "~"}, pad_token="^")
    tokenizer = AutoTokenizer.from_pretrained(new)
    tokenizer.add_tokens([f"<{i}>" for i in range(128)])
    tokenizer.add_special_tokens({"pad_token": "<127>"})
    tokenizer.save_pretrained(new)
    out = merge(base, new, tmp_path / "out", progress=False).folder
    assert token_ids(out) == {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    assert "beyond the model's 128 tokens" in caplog.text


@pytest.mark.parametrize(
    "content", ["{", '{"tokenizer_class": "Unknown", "eos_token": "~"}'], ids=["damaged", "unknown"]
)
def test_a_tokenizer_that_cannot_be_loaded_fails_no_merge(base, adapter, tmp_path, caplog, content):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "tokenizer_config.json").write_text(content)
    out = merge(base, folder, tmp_path / "out", progress=False).folder
    assert token_ids(out) == token_ids(base)
    assert "a tokenizer cannot be loaded" in caplog.text


def test_all_that_tokenizers_are_made_of_and_licences_come_along(base, adapter, tmp_path):
    old = old_base(base, tmp_path / "base")
    named = old / "additional_chat_templates"
    named.mkdir()
    files = ("tekken.json", "tokenizer.model.v3", "USE_POLICY.md", "additional_chat_templates/tool_use.jinja")
    for name in files:
        (old / name).write_text("{}")
    (named / "notes.txt").write_text("not a template")
    out = merge(old, adapter, tmp_path / "out", progress=False).folder
    assert all((out / name).read_text() == "{}" for name in files)
    assert not (out / "additional_chat_templates" / "notes.txt").exists()
    own = trained(adapter, tmp_path / "own")
    out = merge(old, own, tmp_path / "again", progress=False).folder
    assert not (out / "additional_chat_templates").exists()  # it is another tokenizer's
