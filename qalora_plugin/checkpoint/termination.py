"""What SIGTERM and SIGHUP may interrupt, and what not."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Terminated(BaseException):
    """SIGTERM or SIGHUP arrived."""


class Termination:
    """While open, SIGTERM and SIGHUP wait for the end of what must not be torn, and unwind what may be interrupted.

    So that work folders are removed before the signal ends the process after all. Only where it would end it at once:
    a program's own handlers stay. And only in the main thread, where Python handles signals.
    """

    def __init__(self):
        self._arrived: int | None = None
        self._interrupts = False
        main = threading.current_thread() is threading.main_thread()
        codes = (signal.SIGTERM, signal.SIGHUP) if main else ()
        self._taken = [code for code in codes if signal.getsignal(code) is signal.SIG_DFL]

    def __enter__(self) -> "Termination":
        for code in self._taken:
            signal.signal(code, self._arrive)
        return self

    def _arrive(self, code: int, frame: object) -> None:
        first, self._arrived = self._arrived is None, self._arrived or code
        if first and self._interrupts:
            raise _Terminated

    @contextmanager
    def interrupts(self) -> Iterator[None]:
        self._interrupts = True
        try:
            if self._arrived:
                raise _Terminated
            yield
        finally:
            self._interrupts = False

    def __exit__(self, *_: object) -> None:
        for code in self._taken:
            signal.signal(code, signal.SIG_DFL)
        if self._arrived:
            os.kill(os.getpid(), self._arrived)
