"""The C++ sources beside this file, compiled for this CPU."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_ARGUMENTS = {
    "qalora_bfloat16": (),
    "qalora_fill": (_P, _P, _I),
    "qalora_matmul": (_P, _P, _N, _P),
    "qalora_matmul_transposed": (_P, _P, _N, _P),
    "qalora_pool": (_P, _N, _N, _N, _P, _I),
    "qalora_offset_gradient": (_P, _P, _N, _N, _N, _P, _I),
    "qalora_add_offsets": (_P, _N, _N, _N, _P, _N, _P, _I),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, and one warning, where compiling does not work."""
    from torch.utils.cpp_extension import load  # slow to import, and only needed here

    try:
        with _ninja_on_path():
            path = load(
                name=f"qalora_cpu_{_cpu()}",
                sources=[str(path) for path in sorted(Path(__file__).parent.glob("*.cpp"))],
                extra_cflags=["-O3", "-march=native", "-fopenmp"],
                extra_ldflags=["-fopenmp"],  # the libgomp that torch has loaded: one pool of threads
                is_python_module=False,
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "qalora: could not compile the CPU kernels (%s); training works, slower. Install g++ for full speed.",
            str(error).strip().splitlines()[0],
        )
        return None
    compiled = ctypes.CDLL(path)
    for name, arguments in _ARGUMENTS.items():
        if function := getattr(compiled, name, None):  # without bfloat16 instructions only the first two are there
            function.argtypes = arguments
    return compiled


def _cpu() -> str:
    """A name for this kind of CPU: a cache in a shared home serves different machines."""
    features = platform.machine() + platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        features += next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return hashlib.sha256(features.encode()).hexdigest()[:8]


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """torch looks for ninja on PATH, where an environment that was not activated does not put its own."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{before}{os.pathsep}{sysconfig.get_path('scripts')}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
