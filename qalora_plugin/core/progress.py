"""Bars for long work."""

import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

Item = TypeVar("Item")
_ON_STDERR = Console(stderr=True)  # one for all: bars of one console know of each other
_BETWEEN = 0.1  # seconds


def track(items: Iterable[Item], description: str, total: int | None = None, *, shown: bool = True) -> Iterator[Item]:
    """``items``, with a bar on a terminal's stderr that says how many have been taken.

    As ``rich.progress.track``, but without its threads. Where a loop ends by an error that somebody keeps, as notebooks
    do, nobody closes the generator before the garbage collector, in whatever thread that runs in; and a thread that
    draws would wait, in closing it, for the lock that it holds itself.

    Args:
        total: of ``items``, where they have no length. shown: False: no bar.
    """
    shown = shown and _ON_STDERR.is_terminal
    with Progress(console=_ON_STDERR, transient=True, auto_refresh=False, disable=not shown) as bar:
        task = bar.add_task(description, total=total or length_hint(items) or None)
        drawn = time.monotonic()
        for item in items:
            yield item
            bar.advance(task)
            if shown and (now := time.monotonic()) - drawn > _BETWEEN:
                bar.refresh()
                drawn = now
