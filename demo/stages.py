"""Runs the stages of the demo: each a program that writes one folder or file, which is complete or absent.

A stage writes beside its output's name and is renamed into place. What is there already is not made again; once a stage
had to run, all later ones run too, because they stand on it.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

TAIL = 30  # lines of a failed stage's log to show
PATIENCE = 20  # seconds that a program gets to stop by itself


class StageError(Exception):
    """A stage's program failed; the message says where its log is, ``tail`` is the end of it."""

    def __init__(self, message: str, tail: str):
        super().__init__(message)
        self.tail = tail


@dataclass(frozen=True)
class Stage:
    """One program.

    Attributes:
        command: from the path to write to, to the program and its arguments.
        environment: variables on top of this process's own.
        captured: the program prints its output instead of writing it.
        folder: where the program runs; None: in its scratch folder, for programs that litter.
    """

    name: str
    title: str
    output: Path
    command: Callable[[Path], list[str | Path]]
    folder: Path | None
    environment: Mapping[str, str] = field(default_factory=dict)
    captured: bool = False


class Runner:
    """Runs stages one after the other, skips what is there, and remembers how long each took."""

    def __init__(self, run: Path, console: Console):
        self.folder = run
        self.logs, self.scratch, self._record = run / "logs", run / "scratch", run / "seconds.json"
        self.console = console
        self.seconds: dict[str, float] = json.loads(self._record.read_text()) if self._record.is_file() else {}
        self._complete_so_far = True

    def __call__(self, stage: Stage) -> None:
        """Run a stage, unless its output is there and made from what is there now.

        Raises:
            StageError: its program failed.
        """
        if self._complete_so_far and stage.name in self.seconds and stage.output.exists():
            self.console.print(f"[dim]✓ {stage.title}: there already, had taken {self.seconds[stage.name]:.0f} s[/]")
            return
        self._complete_so_far = False
        started = time.monotonic()
        self._note(stage, None)
        work = stage.output.with_name(stage.output.name + ".part")
        for leftover in (work, stage.output, self.scratch):
            _remove(leftover)
        for folder in (self.logs, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self._execute(stage, work)
        work.rename(stage.output)
        _remove(self.scratch)
        self._note(stage, round(time.monotonic() - started, 1))
        self.console.print(f"[green]✓[/] {stage.title}: {self.seconds[stage.name]:.0f} s")

    def _execute(self, stage: Stage, work: Path) -> None:
        log = self.logs / f"{stage.name}.log"
        with log.open("w", encoding="utf-8") as log_file, _program(stage, work, self.scratch) as (process, lines):
            with _live_line(self.console, stage.title) as show:
                for line in lines:
                    log_file.write(line)
                    log_file.flush()
                    show(line)
            status = process.wait()
        if status or not work.exists():
            tail = log.read_text(encoding="utf-8").splitlines()[-TAIL:]
            raise StageError(f"{stage.title}: failed with exit status {status}. The whole log: {log}", "\n".join(tail))

    def _note(self, stage: Stage, seconds: float | None) -> None:
        """Put the seconds of a stage on record; None takes it off."""
        self.seconds.pop(stage.name, None)
        if seconds is not None:
            self.seconds[stage.name] = seconds
        self._record.parent.mkdir(parents=True, exist_ok=True)
        part = self._record.with_suffix(".part")
        part.write_text(json.dumps(self.seconds, indent=2) + "\n")
        part.rename(self._record)


def to_the_end(work: Callable[[], None], console: Console) -> int:
    """The exit status of a demo whose stages ``work`` runs; what went wrong is on the screen."""
    try:
        work()
    except StageError as error:
        console.print(error.tail, markup=False, highlight=False)
        console.print(f"[red]{escape(str(error))}[/]")
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the next run goes on from here")
        return 130
    return 0


@contextmanager
def _program(stage: Stage, work: Path, scratch: Path) -> Iterator[tuple[subprocess.Popen, TextIO]]:
    """A running program and its messages; on leaving, nothing of it is left running."""
    with work.open("w") if stage.captured else nullcontext(subprocess.PIPE) as output:
        process = subprocess.Popen(
            [str(argument) for argument in stage.command(work)],
            cwd=stage.folder or scratch,
            env=os.environ | stage.environment | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE if stage.captured else subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    try:
        yield process, process.stderr if stage.captured else process.stdout
    finally:
        _stop_group(process)


def _stop_group(process: subprocess.Popen) -> None:
    """End a program and all that it started: ask, wait, then kill. Does nothing where nothing is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            process.poll()  # reap the leader, else its group never goes
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _live_line(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """One line on the screen: the stage, the time so far, and what its program said last. Nothing in a log file."""
    fitted = Column(no_wrap=True, overflow="ellipsis")
    last = TextColumn("{task.fields[last]}", style="dim", markup=False, table_column=fitted)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), last)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None, last="")

        def show(line: str) -> None:
            if text := Text.from_ansi(line).plain.strip():
                progress.update(task, last=text)

        yield show


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
