"""Folders below ``~/.cache/qalora`` (or ``$XDG_CACHE_HOME/qalora``) that nobody but this user can write to."""

import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


def private_folder(name: str) -> Path | None:
    """The cache folder ``name``, made if need be; None, and a warning, where there can be none that is safe.

    Compiled code is loaded from here, and digests are taken on trust: what somebody else could have written is not.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache.mkdir(parents=True, exist_ok=True)
        found = cache.stat()
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise PermissionError(f"everybody can write to {cache}")
        folder = cache
        for part in ("qalora", name):
            folder = folder / part
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise PermissionError(f"{folder} is a link, another user's, or open to others")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.warning("qalora: nothing is cached (%s)", error)
        return None
    return folder
