"""The C++ sources beside this file, compiled for this CPU.

One file for each kind of CPU and version of the sources, in a cache folder that only this user can write to. It is
compiled beside its name and renamed, and its name says what it contains: a file that was cut short is compiled again,
since loading it would kill the process. Whoever waits for another process that compiles waits for a lock that the
system frees when that process ends, and not for ever.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qalora_plugin.core.errors import printable
from qalora_plugin.core.private_cache import private_folder

logger = logging.getLogger(__name__)

_P, _N, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
_ARGUMENTS = {
    "qalora_bfloat16": (),
    "qalora_fill": (_P, _P, _I),
    "qalora_factor_gradient": (_P, _P, _I, _P),
    "qalora_in_steps": (_P, _P, _P, _N, _P, _P),
    "qalora_representatives": (_P, _P, _I, _N, _N, _N, _N, _D, _P, _P, _P, _P, _I),
    "qalora_factor_gradient_of": (_P, _P, _P, _N, _P),
    "qalora_matmul": (_P, _P, _N, _P),
    "qalora_matmul_transposed": (_P, _P, _N, _P),
    "qalora_pool": (_P, _N, _N, _N, _P, _I),
    "qalora_offset_gradient": (_P, _P, _N, _N, _N, _P, _I),
    "qalora_add_offsets": (_P, _N, _N, _N, _P, _N, _P, _I),
}
# -fopenmp links the libgomp that torch has loaded: one pool of threads.
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_OLD = 24 * 3600  # seconds
_PATIENCE = 300  # seconds, for the compiler and for another process that compiles; it takes some five


class _CannotCompile(Exception):
    pass


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, and one warning, where compiling does not work."""
    try:
        compiled = _load()
    except (_CannotCompile, OSError) as error:
        logger.warning(
            "qalora: could not compile the CPU kernels (%s); training works, slower. Install g++ for full speed.",
            printable(error).strip().splitlines()[0],
        )
        return None
    for name, arguments in _ARGUMENTS.items():
        if function := getattr(compiled, name, None):  # some need bfloat16 instructions
            function.argtypes = arguments
    return compiled


def _load() -> ctypes.CDLL:
    if (folder := private_folder("kernels")) is not None:
        try:
            return _shared(folder)
        except OSError as error:  # read-only, full, without locks; or a file from a system with other libraries
            logger.info("qalora: the CPU kernels in %s cannot be used (%s)", folder, printable(error))
    with tempfile.TemporaryDirectory() as own:  # for this process alone
        return ctypes.CDLL(str(_compile(Path(own), "cpu")))


def _shared(folder: Path) -> ctypes.CDLL:
    """From the cache, or compiled into it."""
    stem = f"cpu-{_kind()}"
    if path := _find(folder, stem):
        return ctypes.CDLL(str(path))
    with _only_one(folder / f"{stem}.lock"):
        return ctypes.CDLL(str(_find(folder, stem) or _compile(folder, stem)))


def _kind() -> str:
    """What the compiled file depends on: sources, flags, and this kind of CPU (a shared home serves several)."""
    digest = hashlib.sha256(repr((compiler(), _FLAGS, _cpu())).encode())
    for source in _sources("*.cpp", "*.h"):
        digest.update(f"{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _find(folder: Path, stem: str) -> Path | None:
    """The compiled file, if there is one that contains what its name says."""
    for path in folder.glob(f"{stem}-*.so"):
        if path.name == _file_name(stem, path.read_bytes()):
            return path
    return None


def _compile(folder: Path, stem: str) -> Path:
    logger.info("qalora: compiling the CPU kernels, once")
    for left in folder.glob("build-*"):  # by processes that were killed
        if time.time() - left.stat().st_mtime > _OLD:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
        made = Path(scratch) / "kernels.so"
        command = [*compiler(), *_FLAGS, *map(str, _sources("*.cpp")), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE, cwd=scratch)
        except FileNotFoundError:
            raise _CannotCompile(f"there is no compiler {shlex.join(compiler())}") from None
        except subprocess.TimeoutExpired:
            raise _CannotCompile(f"{shlex.join(compiler())} did not end within {_PATIENCE} s") from None
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
            why = next((line for line in lines if "error" in line), lines[-1])
            raise _CannotCompile(f"{shlex.join(compiler())}: {why}") from None
        path = folder / _file_name(stem, made.read_bytes())
        os.replace(made, path)
    return path


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold ``lock``, which ends with this process.

    Raises:
        _CannotCompile: another process holds it for too long.
    """
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - start > _PATIENCE:
                    raise _CannotCompile(f"another process has held {lock} for {_PATIENCE} s") from None
            if not told and time.monotonic() - start > 5:
                logger.warning("qalora: waiting for another process that compiles the CPU kernels (%s)", lock)
                told = True
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _file_name(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in Path(__file__).parent.glob(pattern))


def _cpu() -> str:
    """A name for this kind of CPU."""
    features = platform.machine() + platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        features += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return features
