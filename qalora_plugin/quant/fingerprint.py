"""A fingerprint of a base's tensors: travels with the adapter, so that it is never merged onto another base.

It covers every tensor's name, dtype and shape, all bytes of small tensors, and 64 evenly spaced 4 KiB blocks of large
ones: seconds at any size, and no other quantisation, fine-tune or model comes out the same. It is independent of how
the tensors are spread over shards. (Byte identity of a whole merge is `qalora verify`'s business.)
"""

import hashlib

from .checkpoint import Checkpoint

_BLOCK, _BLOCKS = 4096, 64


def fingerprint(checkpoint: Checkpoint) -> str:
    """``"sha256:…"`` of all tensors but ``offsets``: a merged checkpoint has its base's fingerprint."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        if name.endswith(".offsets"):
            continue
        info = checkpoint.tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        for block in checkpoint.read(name, _sample(info.end - info.start)):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def _sample(size: int) -> list[tuple[int, int]]:
    """``(start, length)`` of the bytes to hash."""
    if size <= _BLOCK * _BLOCKS:
        return [(0, size)]
    last = size - _BLOCK
    return [(last * i // (_BLOCKS - 1), _BLOCK) for i in range(_BLOCKS)]
