"""Small files, replaced whole: readers see the old text or the new one, and a failed write leaves nothing behind."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def replace_text(path: Path, text: str, mode: int = 0o600) -> None:
    """Write ``text`` in place of what ``path`` holds, if anything; a link there is replaced, not followed.

    Args:
        mode: permissions of the new file.

    Raises:
        OSError: the disk is full, the folder cannot be written …; the old file is as it was.
    """
    handle, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(handle, mode)
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
