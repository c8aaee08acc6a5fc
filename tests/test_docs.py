"""What README and docs point to is there, and the commands they show are commands."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import qalora_plugin
from qalora_plugin.commands.cli import app
from qalora_plugin.integrations.axolotl.args import QALoraArgs, refuse_unmergeable

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TEXTS = [*PAGES, *ROOT.glob("example_configs/*.yml"), *ROOT.glob("examples/*.py")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert {link for link in links if not (page.parent / link).exists()} == set()


def shown_commands(text: str) -> list[list[str]]:
    """The words after ``qalora`` wherever a page shows that command, as far as they are command and options."""
    found = re.findall(r"(?:^ +|`|: +|\baxolotl )qalora ([a-z][^`#\n]*)", text, re.M)
    return [
        [word for word in re.split(r"\s+", line) if re.fullmatch(r"[a-z][a-z-]*|--[a-z-]+", word)] for line in found
    ]


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_commands_are_commands(path):
    for words in shown_commands(path.read_text()):
        command: Any = typer.main.get_command(app)
        names = [word for word in words if not word.startswith("--")]
        while hasattr(command, "commands") and names:  # a page may speak of a group of commands
            assert names[0] in command.commands, f"qalora has no {words}"
            command = command.commands[names.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_something_is_shown():
    assert len(shown_commands((ROOT / "README.md").read_text())) >= 8


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_configs_are_configs(page):
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(), re.S):
        config = yaml.safe_load(block)
        refuse_unmergeable(config)
        QALoraArgs.model_validate(config)


def test_the_version_is_the_same_everywhere():
    version = qalora_plugin.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
