"""Where a new folder may go: checked before the work, not when it is to be written."""

import os
from pathlib import Path
from tempfile import mkdtemp

from qalora_plugin.checkpoint.atomic import require_absent
from qalora_plugin.checkpoint.hub import expanded, is_local
from qalora_plugin.core.errors import QALoraError


def require_place(out: str | Path, base: str | Path, what: str, hint: str | None = None) -> Path:
    """The absolute path of an output folder that can be written: absent, outside the base, in a writable folder.

    Args:
        base: folder or Hub id that the work reads.
        what: names the setting in messages (``"--out"``, ``"qalora.merge_dir"``).
        hint: what to do if it exists.

    Raises:
        QALoraError: it cannot; with the reason.
    """
    out = absolute(out)
    require_absent(out, *filter(None, [hint]))
    require_outside(out, base, what)
    require_writable(out, what)
    return out


def absolute(path: str | Path) -> Path:
    return expanded(path).absolute()


def require_outside(out: Path, base: str | Path, what: str) -> None:
    """Refuse to write into the folder of a local base."""
    if is_local(base) and is_inside(out, absolute(base)):
        raise QALoraError(
            f"{what} is {out}, which is the base's folder, or inside it ({base}). The base must stay as it is: choose "
            "a folder elsewhere."
        )


def is_inside(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or something below it, links resolved."""
    return path.resolve().is_relative_to(folder.resolve())


def require_writable(out: Path, what: str) -> None:
    """Refuse a folder that cannot be made, or written: the nearest one that exists decides."""
    there = next(parent for parent in (out, *out.parents) if parent.exists())
    if not there.is_dir():
        raise QALoraError(f"{what} is {out}, but {there} is a file, not a folder. Choose another place.")
    try:  # asking for the rights is not enough: root has all of them, on a read-only disk, too
        _write_into(there)
    except OSError as error:
        raise QALoraError(
            f"{what} is {out}, but {there} is not writable ({error.strerror}). Choose another place, or change its "
            "rights."
        ) from error


def _write_into(folder: Path) -> None:
    """Write something that has no name where the disk can, so that nothing stays of a run that is killed just here."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600))
    except OSError:
        Path(mkdtemp(prefix=".qalora-", dir=folder)).rmdir()
