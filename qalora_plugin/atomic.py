"""Folders that are complete or absent, and files that are linked where they can be."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import QALoraError

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def require_absent(out: Path, hint: str = "Choose another name, or remove it first: nothing is overwritten.") -> None:
    """Refuse an output folder that is already there."""
    if out.exists() or out.is_symlink():
        raise QALoraError(f"the output {out} exists. {hint}")


def require_space(parent: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold. ``needed`` in bytes."""
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise QALoraError(
            f"{parent} has {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB are needed. Free some space, or choose an "
            "output on another disk."
        )


@contextmanager
def new_folder(out: Path, flush: bool = True) -> Iterator[Path]:
    """Yield a work folder beside ``out``; on success it is renamed to ``out``, on error removed.

    A process killed half-way leaves only the hidden work folder ``.<name>.partial``, which the next attempt clears.

    Args:
        flush: have everything on the disk before the rename. Without, as after ``cp``, the system writes it within a
            minute; should the power fail before, files are cut short, which :class:`.Checkpoint` refuses.

    Raises:
        QALoraError: ``out`` exists, another process is writing it, or the disk filled up.
    """
    require_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.partial"
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QALoraError(
                f"another process is writing {out} right now. Wait for it, or choose another name."
            ) from None
        _clear(work)
        try:
            yield work
            if flush:
                for path in work.iterdir():
                    if path.stat().st_nlink == 1:  # what is linked was written, and is kept, by its owner
                        _flush(path)
                _flush(work)
            require_absent(out)
            work.rename(out)
            if flush:
                _flush(out.parent)
        except BaseException as error:
            shutil.rmtree(work, ignore_errors=True)
            if _is_out_of_space(error):
                raise QALoraError(
                    f"the disk of {out.parent} is full, or a size limit was reached ({error}). Nothing was kept. "
                    "Free some space, or choose an output on another disk."
                ) from error
            raise
    finally:
        os.close(lock)


def link_or_copy(source: Path, target: Path, copy: bool = False) -> bool:
    """Hard-link ``source`` (links in it resolved) to ``target``, or copy. Returns True if linked."""
    source = source.resolve()
    if not copy:
        try:
            os.link(source, target)
            return True
        except OSError as error:
            if error.errno not in _CANNOT_LINK:
                raise
    shutil.copyfile(source, target)
    return False


def same_disk(source: Path, parent: Path) -> bool:
    return source.resolve().stat().st_dev == parent.stat().st_dev


def _is_out_of_space(error: BaseException) -> bool:
    """True for ENOSPC and its kin, also where safetensors' writer wraps them as ``… (os error 28)``."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    return isinstance(error, SafetensorError) and any(f"(os error {code})" in str(error) for code in _NO_SPACE)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
