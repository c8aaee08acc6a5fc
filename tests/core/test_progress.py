"""Bars are drawn where somebody sees them, and what ends in the middle leaves nothing that runs on."""

import io
import threading

import pytest
from rich.console import Console

from qalora_plugin.core import progress
from qalora_plugin.core.progress import track


@pytest.fixture
def terminal(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(progress, "_ON_STDERR", Console(file=file, force_terminal=True, width=80))
    monkeypatch.setattr(progress, "_BETWEEN", 0.0)
    return file


def test_a_bar_counts(terminal):
    assert list(track(range(4), "counting")) == [0, 1, 2, 3]
    assert "counting" in terminal.getvalue()
    assert "50%" in terminal.getvalue()


def test_what_has_no_length(terminal):
    assert list(track((i for i in range(4)), "counting", 4)) == [0, 1, 2, 3]
    assert "25%" in terminal.getvalue()
    assert list(track(iter("ab"), "unknown")) == ["a", "b"]


@pytest.mark.parametrize("shown", [True, False])
def test_nothing_where_nobody_sees_it(terminal, monkeypatch, shown):
    if shown:
        monkeypatch.setattr(progress, "_ON_STDERR", Console(file=terminal))
    assert list(track(range(4), "counting", shown=shown)) == [0, 1, 2, 3]
    assert terminal.getvalue() == ""


def test_abandoned_in_the_middle_it_leaves_no_thread(terminal):
    """Such a thread deadlocks when the garbage collector closes another bar in it, while it draws."""
    before = threading.active_count()
    left = [track(range(4), "counting") for _ in range(3)]
    for one in left:
        assert next(one) == 0
        assert next(one) == 1
    assert threading.active_count() == before
    closers = [threading.Thread(target=one.close, daemon=True) for one in left]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(10)
        assert not closer.is_alive()
