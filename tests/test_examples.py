"""The examples run as they stand. Serving's runs where vLLM is: tests/serve/test_examples.py."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from qalora_plugin.formats.opened import QuantizedCheckpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
RUN_HERE = {"train_with_trainer", "train_with_trl", "merge_and_verify", "generate"}


def run(name, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    """The Trainer's run: its adapter, and what it merged."""
    work = tmp_path_factory.mktemp("trainer")
    (work / "notes.txt").write_text("A group shares a scale.\n\nSo it can share an offset.\n\n" * 8)
    run("train_with_trainer", base, work / "out", "--text", work / "notes.txt", "--steps", 2, "--rank", 4)
    return work / "out"


def has_offsets(folder):
    return all(spec.offset_dtype for spec in QuantizedCheckpoint.open(folder).specs.values())


def test_with_the_trainer(trained):
    assert has_offsets(trained / "merged")
    assert "| exactness | verified" in (trained / "merged" / "README.md").read_text()


def test_with_trl(base, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "say ", "completion": "yes"}) + "\n")
    run("train_with_trl", base, tmp_path / "out", "--data", tmp_path / "pairs.jsonl", "--steps", 1, "--rank", 4)
    assert has_offsets(tmp_path / "out" / "merged")


def test_merging(base, trained, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        run("merge_and_verify", base, trained, tmp_path / "merged", "--tokens", 32)
    assert has_offsets(tmp_path / "merged")
    with pytest.raises(SystemExit, match=r"error: .* exists"):
        run("merge_and_verify", base, trained, tmp_path / "merged")


def test_in_transformers(trained, capsys):
    run("generate", trained / "merged", "hello", "--tokens", 2)
    assert "hello" in capsys.readouterr().out


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUN_HERE | {"serve_offline"}
