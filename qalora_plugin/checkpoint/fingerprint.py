"""A fingerprint of a base: travels with the adapter, so that it is never merged onto, or resumed on, another base.

It covers every byte of every tensor, their names, dtypes and shapes, and how the zero-points are stored, which is all
that the config adds to the tensors (bits, groups and order are read off them). It does not depend on how the tensors
are spread over files. BLAKE3 reads a checkpoint about as fast as memory gives it; what was hashed is remembered a file,
for as long as the file has the same identity, size and times.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.replacing import replace_text
from qalora_plugin.checkpoint.tensors import TensorInfo, damaged
from qalora_plugin.core.private_cache import private_folder

_PIECE = 1 << 20  # bytes; a piece is hashed while it is in the CPU's cache
_MOST_THREADS = 8
_KEPT = 1000  # files that are remembered
_TICK, _COARSE_TICK = 0.05, 2.5  # seconds in which a file can change again without its times showing it
_BLOCK, _BLOCKS = 4096, 64

Identity = tuple[int, int, int, int, int]


def fingerprint(checkpoint: Checkpoint, reading: str, like: str | None = None) -> str:
    """``"blake3:…"`` of all tensors and their reading.

    Args:
        reading: what the format's config adds to the tensors (``CheckpointFormat.reading``).
        like: a recorded fingerprint to compare with. Adapters made before this one record a ``"sha256:…"`` of samples:
            then the answer is of that kind.
    """
    if is_sampled(like):
        return _sampled(checkpoint)
    digests: dict[str, str] = {}
    for file in dict.fromkeys(info.file for info in checkpoint.tensors.values()):
        tensors = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
        digests |= _digests(checkpoint.folder / file, tensors)
    whole = blake3(json.dumps(["qalora base", 2, reading]).encode())
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        whole.update(json.dumps([name, info.dtype, info.shape, digests[name]]).encode())
    return f"blake3:{whole.hexdigest()}"


def is_sampled(recorded: str | None) -> bool:
    """Whether a recorded fingerprint is one of samples, as older adapters have it."""
    return recorded is not None and recorded.startswith("sha256:")


def identity(path: Path) -> Identity:
    """What tells whether a file is the same one and unchanged; any write, but also any new link, changes it."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def keep_remembering(path: Path, before: Identity) -> None:
    """Say that nothing but a new link changed the identity of a file since it was ``before``."""
    after = identity(path)
    if before[:4] == after[:4] and (digests := _recall(before)):
        _remember(after, digests)


def _digests(path: Path, tensors: dict[str, TensorInfo]) -> dict[str, str]:
    """Name → digest of the bytes of these tensors of one file."""
    before = identity(path)
    known = _recall(before)
    missing = [info for name, info in tensors.items() if name not in known]
    if missing:
        names = [name for name in tensors if name not in known]
        threads = min(os.cpu_count() or 1, _MOST_THREADS)
        with ThreadPoolExecutor(threads) as pool:
            known |= dict(zip(names, pool.map(lambda info: _digest(path, info), missing), strict=True))
        if identity(path) == before:
            _remember(before, known)
    return known


def _digest(path: Path, info: TensorInfo) -> str:
    digest, piece = blake3(), bytearray(min(_PIECE, info.end - info.start))
    view = memoryview(piece)
    with open(path, "rb", buffering=0) as file:
        file.seek(info.start)
        left = info.end - info.start
        while left:
            count = file.readinto(view[:left])
            if not count:
                raise damaged(path)
            digest.update(view[:count])
            left -= count
    return digest.hexdigest()


def _recall(found: Identity) -> dict[str, str]:
    folder = private_folder("digests")
    with suppress(OSError, ValueError, AttributeError):
        content = json.loads(_entry(folder, found).read_text()) if folder else {}
        if content.get("identity") == list(found):
            return content["tensors"]
    return {}


def _remember(found: Identity, digests: dict[str, str]) -> None:
    """Unless the file is so young that it could change without its times showing it."""
    mtime, ctime = found[3:]
    tick = _COARSE_TICK if mtime % 10**9 == ctime % 10**9 == 0 else _TICK
    folder = private_folder("digests")
    if folder is None or time.time() - max(mtime, ctime) / 1e9 < tick:
        return
    with suppress(OSError):  # a full or read-only cache costs time, nothing else
        replace_text(_entry(folder, found), json.dumps({"identity": found, "tensors": digests}))
        if len(entries := list(folder.iterdir())) > _KEPT:
            for path in sorted(entries, key=lambda path: path.stat().st_mtime)[:-_KEPT]:
                path.unlink()


def _entry(folder: Path, found: Identity) -> Path:
    return folder / f"{found[0]:x}-{found[1]:x}.json"


def _sampled(checkpoint: Checkpoint) -> str:
    """``"sha256:…"`` of all tensors but ``offsets``, of large ones 64 blocks: what older adapters record."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        if name.endswith(".offsets"):
            continue
        info = checkpoint.tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        for block in checkpoint.read(name, _sample(info.end - info.start)):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _sample(size: int) -> Iterable[tuple[int, int]]:
    """``(start, length)`` of the bytes to hash."""
    if size <= _BLOCK * _BLOCKS:
        return [(0, size)]
    last = size - _BLOCK
    return [(last * i // (_BLOCKS - 1), _BLOCK) for i in range(_BLOCKS)]
