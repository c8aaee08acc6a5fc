"""Several models in one run: one at a time in memory, on the same tokens, and what was measured is kept."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from typer.testing import CliRunner

from qalora_plugin.commands.cli import app
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval import running
from qalora_plugin.eval.models import Subject
from qalora_plugin.eval.planning import Settings, plan, read_data

TEXT = "Held out, and not trained on. " * 4


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return read_data([tmp_path / "text.txt"], [], Settings())


def subjects(*folders):
    return [Subject.open(str(folder)) for folder in folders]


@pytest.mark.parametrize("with_reference", [False, True])
def test_one_model_at_a_time(base, merged, data, monkeypatch, with_reference):
    loaded, alive = [], []
    load = Subject._load

    def noting(self, dtype):
        gc.collect()
        alive.append([reference for reference in loaded if reference() is not None])
        model = load(self, dtype)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Subject, "_load", noting)
    (reference,) = subjects(base)
    made = plan(subjects(base, merged, base), data, Settings(), reference if with_reference else None)
    assert len(list(running.measure(made))) == 3
    assert alive == [[]] * (3 + with_reference)


def test_what_was_measured_is_shown_though_a_later_model_fails(base, merged, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    load, count = Subject._load, iter(range(9))

    def once(self, dtype):
        if next(count) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14 GiB")
        return load(self, dtype)

    monkeypatch.setattr(Subject, "_load", once)
    arguments = ["eval", str(base), str(merged), "--text", str(tmp_path / "text.txt")]
    for option, shown in (((), "text.txt, 119 tokens"), (("--json",), '"loss"')):
        failed = CliRunner().invoke(app, [*arguments, *option])
        assert failed.exit_code == 1
        assert shown in failed.stdout
        assert "does not fit the memory of cpu" in failed.stderr
        assert "--dtype bfloat16" in failed.stderr


@pytest.mark.parametrize("error", [QALoraError("no answers"), KeyboardInterrupt()])
def test_losses_are_kept_though_answers_fail(base, tmp_path, monkeypatch, error):
    """Answers take far longer than what was measured before them."""
    (tmp_path / "qa.jsonl").write_text('{"question": "2?", "answer": "2"}')

    def fail(*_):
        raise error

    monkeypatch.setattr(running, "exact_match", fail)
    settings = Settings(generate=1)
    found = running.measure(plan(subjects(base), read_data([], [tmp_path / "qa.jsonl"], settings), settings))
    result = next(found)
    assert result.loss > 0
    assert result.exact is None
    with pytest.raises(type(error)):
        next(found)


def test_the_shortest_model_sets_the_length_for_all(base, tmp_path, data):
    short = shutil.copytree(base, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    made = plan(subjects(base, short), data, Settings(length=64))
    assert made.examples[0] == made.examples[1]
    assert max(len(example.ids) for example in made.examples[0][0]) == 16
    assert made.notes == [f"sequences of 16 tokens, not 64: {short} takes no more"]
    (reference,) = subjects(base)
    plan(subjects(short), data, Settings(), reference)  # the same tokens: there is a KL


def test_a_model_that_looks_ahead_is_refused(base, data, monkeypatch):
    monkeypatch.setattr(running, "looks_ahead", lambda model: True)
    with pytest.raises(QALoraError, match="depends on later ones, and losses of it mean nothing"):
        list(running.measure(plan(subjects(base), data, Settings())))


def test_data_are_read_before_checkpoints(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Subject, "open", pytest.fail)
    (tmp_path / "qa.jsonl").write_text('{"question": "2?", "answer": "2"}')
    for given in (
        ["--jsonl", tmp_path / "none.jsonl"],
        ["--jsonl", tmp_path / "qa.jsonl", "--generate", 1, "--answer-pattern", "(["],
    ):
        result = CliRunner().invoke(app, ["eval", str(base), *map(str, given)])
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)


def test_figures_are_whole_on_narrow_terminals(base, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setenv("COLUMNS", "40")
    arguments = ["eval", str(base), "--text", str(tmp_path / "text.txt"), "--csv", str(tmp_path / "out.csv")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    loss = (tmp_path / "out.csv").read_text().splitlines()[1].split(",")[6]
    assert f"{float(loss):.4f}" in result.stdout
