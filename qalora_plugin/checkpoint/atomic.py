"""Folders that are complete or absent, and files that are linked where they can be.

``out`` is written as ``folder`` inside a private work folder beside it, ``.<name>.partial-<random>``, and renamed. The
work folder also holds the lock file that marks it as ours: a killed run leaves both, and the next run that writes the
same name removes them. Everything that is removed is reached through open folders, never by following a name.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from qalora_plugin.checkpoint.termination import Termination
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line

_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FOLDER, _LOCK = "folder", "lock"
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_LONGEST_NAME = 200  # bytes of the final name that a work folder's name repeats; file systems take 255
_ATTEMPTS = 100
_RENAME_NOREPLACE = 1
_NO_SUCH_RENAME = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}  # old kernels, NFS


def require_absent(out: Path, hint: str = "Choose another name, or remove it first: nothing is overwritten.") -> None:
    """Refuse an output folder that is already there, or that cannot be looked for."""
    with os_errors_in_one_line():
        if out.is_symlink() or out.exists():
            raise QALoraError(f"the output {out} exists. {hint}")


def require_space(parent: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold. ``needed`` in bytes. ``parent`` need not be there yet."""
    existing = next(place for place in (parent, *parent.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise QALoraError(
            f"{existing} has {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB are needed. Free some space, or choose an "
            "output on another disk."
        )


@contextmanager
def new_folder(out: Path, flush: bool = True) -> Iterator[Path]:
    """Yield an empty folder to write into; on success it is renamed to ``out``, on error removed.

    Also on SIGTERM and SIGHUP, unless the program handles them itself. What SIGKILL leaves the next run removes.
    Files get the permissions that the umask grants.

    Args:
        flush: have everything on the disk before the rename. Without, as after ``cp``, the system writes it within a
            minute; should the power fail before, files are cut short, which :class:`.Checkpoint` refuses.

    Raises:
        QALoraError: ``out`` exists, another process is writing it, or the system refuses (permissions, a full disk …).
    """
    with _new(out, flush, _rename_new) as work:
        yield work


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Yield a path to write a file to; on success it is renamed to ``out``, on error removed: as :func:`new_folder`."""
    with _new(out, True, _rename_file) as work:
        yield work / out.name


@contextmanager
def _new(out: Path, flush: bool, rename: Callable[[int, int, Path], None]) -> Iterator[Path]:
    require_absent(out)
    with os_errors_in_one_line(), Termination() as termination:
        out.parent.mkdir(parents=True, exist_ok=True)
        parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _sweep(parent, out)
            with _work_folder(parent, out) as (work, handle), termination.interrupts():
                yield work
                _finish(work, handle, flush)
                rename(handle, parent, out)
                if flush:
                    os.fsync(parent)
        except BaseException as error:
            if _is_out_of_space(error):
                raise QALoraError(
                    f"the disk of {out.parent} is full, or a size limit was reached ({error}). Nothing was kept. "
                    "Free some space, or choose an output on another disk."
                ) from error
            raise
        finally:
            os.close(parent)


@contextmanager
def _work_folder(parent: int, out: Path) -> Iterator[tuple[Path, int]]:
    """A private, locked folder of our own beside ``out``: the path to write to, and a handle on the work folder."""
    work, handle, lock = _make_work_folder(parent, out)
    try:
        os.mkdir(_FOLDER, dir_fd=handle)
        yield work / _FOLDER, handle
    finally:
        _remove(parent, work.name, handle)
        os.close(lock)
        os.close(handle)


def _make_work_folder(parent: int, out: Path) -> tuple[Path, int, int]:
    for _ in range(_ATTEMPTS):
        work = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
        handle = lock = None
        try:
            handle = os.open(work.name, _OPEN_FOLDER, dir_fd=parent)
            lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=handle)
            own = os.fstat(lock).st_uid == os.fstat(handle).st_uid  # whoever a network disk takes us for
            if own and _take(lock) is not False and _is_named(handle, _LOCK, lock):
                return work, handle, lock
        except (FileNotFoundError, NotADirectoryError):
            pass
        # Another run's sweep took it, not yet locked, for a leftover: once more.
        for opened in (handle, lock):
            if opened is not None:
                os.close(opened)
    raise QALoraError(f"{work} was taken away or replaced at once. Choose a place that only you can write to.")


def _sweep(parent: int, out: Path) -> None:
    """Remove what killed runs for ``out`` left.

    Raises:
        QALoraError: another process is writing ``out`` right now.
    """
    prefix = _prefix(out)
    for name in os.listdir(parent):
        if not name.startswith(prefix):
            continue
        try:
            handle = os.open(name, _OPEN_FOLDER, dir_fd=parent)
        except OSError:  # a link or a file, gone, or closed to us: not one of ours
            continue
        try:
            if os.fstat(handle).st_uid == os.geteuid():
                _sweep_one(parent, name, handle, out)
        finally:
            os.close(handle)


def _sweep_one(parent: int, name: str, handle: int, out: Path) -> None:
    try:
        lock = os.open(_LOCK, os.O_RDWR | os.O_NOFOLLOW, dir_fd=handle)
    except FileNotFoundError:
        with suppress(OSError):  # killed before there was a lock, or not ours: nothing that has content is removed
            os.rmdir(name, dir_fd=parent)
        return
    try:
        taken = _take(lock)
        if taken is False:
            raise QALoraError(f"another process is writing {out} right now. Wait for it, or choose another name.")
        if taken and _is_named(handle, _LOCK, lock):
            _remove(parent, name, handle)
    finally:
        os.close(lock)


def _remove(parent: int, name: str, handle: int) -> None:
    """Remove a work folder: its ``folder``, its lock, and itself if nothing else is in it."""
    if _is_there(handle, _FOLDER):
        shutil.rmtree(_FOLDER, ignore_errors=True, dir_fd=handle)
    with suppress(OSError):
        os.unlink(_LOCK, dir_fd=handle)
        os.rmdir(name, dir_fd=parent)


def _finish(work: Path, handle: int, flush: bool) -> None:
    """Permissions as the umask grants them (``save_file`` gives none to others), and, if asked, all on the disk."""
    folder = os.open(_FOLDER, _OPEN_FOLDER, dir_fd=handle)
    try:
        if not os.path.samestat(os.fstat(folder), os.stat(work)):
            raise QALoraError(f"{work} was replaced while it was written. Choose a place that only you can write to.")
        mode = stat.S_IMODE(os.fstat(folder).st_mode) & 0o666
        for name in os.listdir(folder):
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:  # what is linked is its owner's business
                _settle(name, folder, mode, flush)
        if flush:
            os.fsync(folder)
    finally:
        os.close(folder)


def _settle(name: str, folder: int, mode: int, flush: bool) -> None:
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        os.fchmod(handle, mode)
        if flush:
            os.fsync(handle)
    finally:
        os.close(handle)


def _rename_new(handle: int, parent: int, out: Path) -> None:
    """Rename the finished folder to ``out``, which must not exist: not even as an empty folder."""
    try:
        if not _renameat2(handle, _FOLDER, parent, out.name):
            os.mkdir(out.name, dir_fd=parent)  # fails if there is anything; only an empty folder can then be replaced
            os.rename(_FOLDER, out.name, src_dir_fd=handle, dst_dir_fd=parent)
    except FileExistsError:
        raise QALoraError(f"the output {out} was made by another process in the meantime. Nothing was kept.") from None
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise QALoraError(f"another process wrote into {out} in the meantime. Nothing was kept.") from None


def _rename_file(handle: int, parent: int, out: Path) -> None:
    """Rename the finished file to ``out``, which must not exist."""
    source = f"{_FOLDER}/{out.name}"
    try:
        if not _renameat2(handle, source, parent, out.name):
            os.link(source, out.name, src_dir_fd=handle, dst_dir_fd=parent)  # fails if there is anything
    except FileExistsError:
        raise QALoraError(f"the output {out} was made by another process in the meantime. Nothing was kept.") from None


def _renameat2(source_folder: int, source: str, target_folder: int, target: str) -> bool:
    """Linux's rename that replaces nothing. False where there is none."""
    rename: Callable | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(source_folder, os.fsencode(source), target_folder, os.fsencode(target), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_RENAME:
        return False
    raise OSError(code, os.strerror(code), target)


def link_or_copy(source: Path, target: Path, copy: bool = False) -> bool:
    """Hard-link ``source`` (links in it resolved) to ``target``, a new name, or copy. Returns True if linked."""
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


def _prefix(out: Path) -> str:
    return f".{os.fsdecode(os.fsencode(out.name)[:_LONGEST_NAME])}.partial-"


def _take(lock: int) -> bool | None:
    """Whether the lock is ours now; None on a disk without locks (some of Lustre): there leftovers stay."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is_named(folder: int, name: str, handle: int) -> bool:
    """Whether ``name`` in ``folder`` still is the file behind ``handle``: who waited may hold what was removed."""
    try:
        return os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def _is_there(folder: int, name: str) -> bool:
    with suppress(FileNotFoundError):
        os.stat(name, dir_fd=folder, follow_symlinks=False)
        return True
    return False


def _is_out_of_space(error: BaseException) -> bool:
    """True for ENOSPC and its kin, also where safetensors' writer wraps them as ``… (os error 28)``."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    return isinstance(error, SafetensorError) and any(f"(os error {code})" in str(error) for code in _NO_SPACE)
