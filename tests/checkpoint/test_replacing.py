"""Small files replaced whole, or left as they were."""

import os

import pytest

from qalora_plugin.checkpoint.replacing import replace_text


def test_the_new_text_takes_the_place_of_the_old_or_of_a_link(tmp_path):
    path, elsewhere = tmp_path / "README.md", tmp_path / "elsewhere"
    elsewhere.write_text("another's")
    path.symlink_to(elsewhere)
    replace_text(path, "new", mode=0o644)
    assert (path.read_text(), elsewhere.read_text()) == ("new", "another's")
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o644
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["README.md", "elsewhere"]


@pytest.mark.parametrize("fails", ["replace", "fchmod"])
def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch, fails):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "README.md"
    path.write_text("old")
    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("README.md", "old")]
