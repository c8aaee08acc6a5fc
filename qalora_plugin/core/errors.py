"""The one error type that users see, and how the system's own errors become one.

Every message says what was found, what was expected, and what to do about it.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

_SHOWN = 300  # characters of a word
_ENDLESS = re.compile(r"\S{400,}")
_ADVICE = {
    errno.EACCES: "Give yourself the permission, or choose another place.",
    errno.EPERM: "Give yourself the permission, or choose another place.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "It is not there, or no longer: leave the folder alone while it is in use, and try again.",
    errno.ENOTDIR: "A part of that path is a file: choose another one.",
    errno.ELOOP: "Its links lead in a circle: repair them.",
    errno.ENOSPC: "Free some space, or choose a place on another disk.",
    errno.EDQUOT: "Free some space, or choose a place on another disk.",
    errno.EFBIG: "Free some space, or choose a place on another disk.",
}


class QALoraError(ValueError):
    """A config, checkpoint, adapter or flag that cannot be used as it is.

    One line, whatever it quotes from files and other libraries: what a terminal would obey instead of showing is
    escaped, what is endless is cut.
    """

    def __init__(self, message: object = ""):
        line = re.sub(r"\s*\n\s*", " ", printable(message))
        super().__init__(_ENDLESS.sub(lambda word: f"{word[0][:_SHOWN]}…", line))


def printable(text: object) -> str:
    """``text`` with everything escaped that is neither visible nor a line break (escape sequences, bidi marks …)."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


@contextmanager
def os_errors_in_one_line() -> Iterator[None]:
    """Inside (or in a function so decorated) an ``OSError`` becomes a :class:`QALoraError` that names the path."""
    try:
        yield
    except OSError as error:
        path = "" if error.filename is None else f"{error.filename}: "
        what = error.strerror or str(error) or type(error).__name__
        raise QALoraError(f"{path}{what}. {_ADVICE.get(error.errno or 0, 'Check the disk and try again.')}") from error
    except UnicodeEncodeError as error:
        raise QALoraError(f"{error.object!r} is no name that a file can have. Choose another.") from error
