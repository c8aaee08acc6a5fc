"""``qalora eval`` as a user types it."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_base, make_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from qalora_plugin.commands.cli import app
from qalora_plugin.eval import results
from qalora_plugin.eval.models import Subject

runner = CliRunner()


def run(*arguments, code=0):
    result = runner.invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def refused(*arguments):
    """The line that says why."""
    (line,) = run(*arguments, code=1).stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("Held out, and not trained on. " * 4)
    rows = [{"question": f"{i} + 1?", "answer": f"Add.\n#### {i + 1}"} for i in range(3)]
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A 16-bit model of another size."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_any_model_in_one_table(base, adapter, merged, dense, files, tmp_path):
    named = shutil.copytree(adapter, tmp_path / "named")
    shutil.copyfile(base / "config.json", named / "config.json")  # as training runs leave it
    (tmp_path / "short.jsonl").write_text(json.dumps({"question": "2?", "answer": "#### 2"}))
    result = run(
        dense, base, merged, named, f"{base}+{adapter}", "--adapter", adapter, "--text", files / "text.txt",
        "--jsonl", tmp_path / "short.jsonl", "--reference", base, "--csv", tmp_path / "out.csv",
        "--png", tmp_path / "out.png", "--tokens", 40, code=1,
    )  # fmt: skip
    assert "cannot be a base: it is dense" in result.stderr  # an adapter on the first model
    result = run(
        base, dense, merged, named, f"{base}+{adapter}", "--adapter", adapter, "--text", files / "text.txt",
        "--jsonl", tmp_path / "short.jsonl", "--reference", base, "--csv", tmp_path / "out.csv",
        "--png", tmp_path / "out.png", "--tokens", 40,
    )  # fmt: skip
    assert "text.txt, 39 tokens" in result.stdout
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["kind"] for row in rows[::2]] == ["base", "dense", "merged", *["base + adapter"] * 3]
    losses, bits = ([float(row[key]) for row in rows[::2]] for key in ("loss", "served_bits"))
    assert losses[3] == losses[4] == losses[5] == pytest.approx(losses[2], abs=1e-3)
    assert losses[2] != losses[0]
    assert bits[0] == 4.625
    assert bits[1] == 16
    assert 4.625 < bits[2] <= 5.125  # offsets in float16
    assert float(rows[0]["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(rows[4]["kl"]) > 1e-4
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_answers_and_json(base, files, tmp_path):
    (tmp_path / "qa.jsonl").write_text('{"text": "another file of that name"}')
    both = ("--jsonl", files / "qa.jsonl", "--jsonl", tmp_path / "qa.jsonl")
    result = run(base, *both, "--generate", 2, "--max-new-tokens", 3, "--json")
    report = json.loads(result.stdout[result.stdout.index("{") :])
    found, other = report["results"]
    assert (found["data"], other["data"]) == (f"{files.name}/qa.jsonl", f"{tmp_path.name}/qa.jsonl")
    assert other["answered"] is None
    assert found["answered"] == 2
    assert (found["exact"], found["exact_direct"], found["unfinished"]) == (0, 0, 2)
    assert report["settings"]["dtype"] == "float32"


def test_the_table_of_answers(capsys):
    answers = {"answered": 4, "exact": 0.5, "exact_direct": 0.25}
    row = results.Result("m", "base", "qa.jsonl", 10**6, 4.5, tokens=9, loss=1.0, **answers)
    task = results.Result("m", "base", "arc", 10**6, None, metric="acc", score=0.3, stderr=0.01)
    results.show([row, task])
    shown = capsys.readouterr().out
    for expected in ("qa.jsonl, 9 tokens", "qa.jsonl, 4 answers", "reasoned", "25.0%", "arc, acc", "0.3000"):
        assert expected in shown
    assert "KL" not in shown


def test_what_is_no_model(base, files, tmp_path):
    (tmp_path / "empty").mkdir()
    text = ("--text", files / "text.txt")
    assert "has no config.json" in refused(base, tmp_path / "empty", *text)
    assert "does not exist" in refused(base, tmp_path / "none", *text)
    assert "is a file, expected a model folder" in refused(base, files / "text.txt", *text)
    strange = make_base(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    for model_type, match in (("nonesuch", "no model's config"), ("vit", "no model that continues text")):
        (strange / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        assert match in refused(base, strange, *text)
    own_code = {"model_type": "nonesuch", "auto_map": {"AutoConfig": "code.Config"}}
    (strange / "code.py").write_text("raise SystemExit('ran')")
    (strange / "config.json").write_text(json.dumps(config | own_code))
    assert "no model's config" in refused(base, strange, *text)
    stated = config["quantization_config"] | {"quant_method": "awq"}
    (strange / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    assert "qalora import awq" in refused(base, strange, *text)


def test_weights_that_are_not_there(dense, files, tmp_path):
    """transformers would fill them in at random."""
    half = shutil.copytree(dense, tmp_path / "half")
    tensors = load_file(half / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
    said = run(half, "--text", files / "text.txt", code=1).stderr  # after transformers' own report
    assert "lacks model.layers.0.mlp.up_proj.weight" in said.splitlines()[-1]


def test_what_does_not_belong_together(base, adapter, files, tmp_path):
    other, text = make_base(tmp_path / "other", seed=1), ("--text", files / "text.txt")
    assert "was trained on another base" in refused(other, "--adapter", adapter, *text)
    unnamed = shutil.copytree(adapter, tmp_path / "unnamed")
    config = json.loads((unnamed / "adapter_config.json").read_text())
    (unnamed / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "does not name its base. Pass BASE+" in refused(unnamed, *text)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(other)
    assert "make other tokens" in refused(base, "--reference", other, "--jsonl", files / "qa.jsonl")
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    assert "has no tokenizer that can be loaded" in refused(other, *text)


def test_nothing_to_do(base, files, tmp_path, monkeypatch):
    text = ("--text", files / "text.txt")
    assert "there is nothing to measure" in refused(base)
    assert "is there twice" in refused(base, *text, *text)
    assert "--generate needs questions" in refused(base, *text, "--generate", 3)
    assert "--png draws losses" in refused(base, "--png", tmp_path / "x.png")
    assert "--dtype is 'int8'" in refused(base, *text, "--dtype", "int8")
    assert "exists" in refused(base, *text, "--csv", files / "text.txt")
    assert "Make it first" in refused(base, *text, "--csv", tmp_path / "none" / "x.csv")
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    assert "pip install 'qalora[eval]'" in refused(base, *text, "--png", tmp_path / "x.png")


UNUSED = {  # option and value → what it needs; each with what else is asked for
    ("--answer-pattern", "(["): "--generate ROWS",
    ("--max-new-tokens", 8): "--generate ROWS",
    ("--kl-tokens", 8): "--reference MODEL",
    ("--tasks-path", "/nope"): "--tasks NAMES",
    ("--rows", 3): "--jsonl FILE or --tasks NAMES",
    ("--tokens", 8): "--text FILE",
    ("--length", 8): "--text FILE",
    ("--reference", "x"): "--text FILE or --jsonl FILE",
}


@pytest.mark.parametrize("option", UNUSED, ids=lambda option: option[0])
def test_options_that_would_change_nothing(base, files, option):
    other = {
        "--text FILE": ("--jsonl", files / "qa.jsonl"), "--text FILE or --jsonl FILE": ("--tasks", "arc_easy"),
    }.get(UNUSED[option], ("--text", files / "text.txt"))  # fmt: skip
    assert f"{option[0]} needs {UNUSED[option]}" in refused(base, *other, *option)


def test_what_names_nothing(base, files):
    text = ("--text", files / "text.txt")
    assert "--tasks , names no task" in refused(base, *text, "--tasks", ",")
    assert "--revision main is of a Hub id" in refused(base, *text, "--revision", "main")


def test_rows_longer_than_a_model_takes(dense, files, tmp_path):
    short = shutil.copytree(dense, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    assert "all rows of qa.jsonl are longer than the 16 tokens" in refused(short, "--jsonl", files / "qa.jsonl")
    (tmp_path / "mixed.jsonl").write_text('{"text": "short"}\n{"text": "a text that is longer than that"}\n')
    result = run(short, "--jsonl", tmp_path / "mixed.jsonl")
    assert "note: 1 of 2 rows of mixed.jsonl are longer than the 16 tokens" in result.stderr


def test_an_adapters_own_tokenizer_counts(base, adapter, tmp_path):
    trained = shutil.copytree(adapter, tmp_path / "trained")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "own"
    tokenizer.save_pretrained(trained)
    assert Subject.open(str(base), str(trained)).tokenizer.chat_template == "own"
    assert Subject.open(str(base), str(adapter)).tokenizer.chat_template is None


def test_data_that_hold_nothing_to_predict(base, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    assert "longer than one token" in refused(base, "--text", tmp_path / "one.txt")
    assert "without a second token to predict" in refused(base, "--jsonl", tmp_path / "one.jsonl")


def test_models_that_count_their_positions_by_another_name(files, tmp_path):
    """GPT-2's ``n_positions``: beyond them it has no embedding."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "model"
    )
    make_tokenizer().save_pretrained(tmp_path / "model")
    run(tmp_path / "model", "--text", files / "text.txt")
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "q" * 80, "answer": "1"}) + "\n" + '{"text": "ab"}')
    found = run(
        tmp_path / "model", "--jsonl", files / "qa.jsonl", "--jsonl", tmp_path / "long.jsonl", "--generate", 2,
        "--max-new-tokens", 100, "--json",
    )  # fmt: skip
    answers, none = json.loads(found.stdout)["results"]
    assert (answers["answered"], answers["unfinished"], none["answered"]) == (2, 2, 1)


def test_tokenizers_and_references_of_other_models(base, dense, files, tmp_path):
    for name, vocabulary in (("small", 64), ("large", 192)):
        config = LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    text = ("--text", files / "text.txt")
    assert "is none of the 64 that" in refused(dense, tmp_path / "small", *text)
    said = refused(base, tmp_path / "large", "--reference", dense, *text, "--csv", tmp_path / "x.csv")
    assert "192 logits a token" in said
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_damaged_models_are_refused_before_any_is_measured(base, dense, files, tmp_path, value, dtype, monkeypatch):
    lost = LlamaForCausalLM.from_pretrained(dense, dtype=getattr(torch, dtype))
    lost.model.embed_tokens.weight.data[3, 5] = float(value)
    lost.save_pretrained(tmp_path / "lost")
    make_tokenizer().save_pretrained(tmp_path / "lost")
    monkeypatch.setattr(Subject, "loaded", pytest.fail)
    text, match = ("--text", files / "text.txt"), f"{tmp_path / 'lost'}: model.embed_tokens.weight holds NaN or Inf"
    assert match in refused(dense, tmp_path / "lost", *text, "--png", tmp_path / "x.png")
    assert match in refused(dense, "--reference", tmp_path / "lost", *text, "--json")
    quantized = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(quantized / "model.safetensors")
    tensors["model.norm.weight"][0] = float(value)
    (quantized / "model.safetensors").unlink()
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight holds NaN or Inf" in refused(dense, quantized, *text)


def test_a_model_that_overflows_has_no_figures(dense, files, tmp_path):
    large = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32)
    large.model.norm.weight.data.fill_(1e6)  # no float16
    large.save_pretrained(tmp_path / "large")
    make_tokenizer().save_pretrained(tmp_path / "large")
    text = ("--text", files / "text.txt", "--csv", tmp_path / "x.csv")
    half = (*text, "--dtype", "float16")
    failed = run(dense, tmp_path / "large", *half, code=1)
    assert "text.txt, 119 tokens" in failed.stdout  # the table of the first
    said = failed.stderr.splitlines()[-1]
    assert f"the loss of {tmp_path / 'large'} is nan on text.txt" in said
    assert "float16" in said
    assert "Pass --dtype float32" in said
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 2  # what was measured before is kept
    (tmp_path / "x.csv").unlink()
    said = run(dense, "--reference", tmp_path / "large", *half, code=1).stderr.splitlines()[-1]
    assert f"the reference {tmp_path / 'large'} has no likeliest token on text.txt" in said
    run(tmp_path / "large", *text)


def test_places_and_devices_that_cannot_be_used(base, files, tmp_path):
    text = ("--text", files / "text.txt")
    for device in ("nonesuch", "meta", "xpu", "hpu"):
        assert f"--device {device} cannot be used here" in refused(base, *text, "--device", device)
    for option in ("--csv", "--png"):
        assert f"{option} is /proc/x, but /proc is not writable" in refused(base, *text, option, "/proc/x")
    out = tmp_path / "out"
    assert "are both" in refused(base, *text, "--csv", out, "--png", out)


def test_a_chat_template_that_refuses(dense, tmp_path):
    strict = shutil.copytree(dense, tmp_path / "strict")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    tokenizer.save_pretrained(strict)
    (tmp_path / "qa.jsonl").write_text('{"question": "2?", "answer": "2"}')
    assert "no system here" in refused(strict, "--jsonl", tmp_path / "qa.jsonl")


def test_what_mlx_quantized(base, merged, files, tmp_path):
    assert runner.invoke(app, ["export", "mlx", str(merged), str(tmp_path / "mlx")]).exit_code == 0
    assert "quant_method is 'mlx'" in refused(base, tmp_path / "mlx", "--text", files / "text.txt")
