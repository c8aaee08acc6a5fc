"""What ``qalora inspect`` says of a base whose config.json transformers cannot build."""

import json
import shutil

import pytest

from qalora_plugin.commands.inspecting import inspect


def edited(base, folder, **changes):
    shutil.copytree(base, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return inspect(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "nosuch"},
        {"vocab_size": "x"},
        {"num_attention_heads": 0},
        {"hidden_act": "nope"},
        {"dtype": "nope"},
    ],
    ids=str,
)
def test_no_base_if_nobody_builds_it(base, tmp_path, changes):
    found = edited(base, tmp_path / "edited", **changes)
    assert not found.can_be_base
    assert "makes no model of" in found.why_not
    assert "config.json (" in found.why_not


def test_what_code_of_its_own_may_build_is_not_refused(base, tmp_path):
    found = edited(base, tmp_path / "edited", model_type="nosuch", auto_map={"AutoConfig": "code.Config"})
    assert found.can_be_base
