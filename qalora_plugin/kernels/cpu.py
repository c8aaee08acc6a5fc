"""Dequantisation on a CPU: ``cpu.cpp``, compiled at the first use (a few seconds, cached on disk).

Plain torch makes some fifty small passes where this makes one; in a small model's training step that is the difference
between 0.8 and 0.95 of the frozen dense model's speed. Without a C++ compiler :mod:`planes` does the work.
"""

import ctypes
import functools
import logging
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..quant.layout import codes_per_period, zero_shift
from .packed import PackedWeight

logger = logging.getLogger(__name__)

SMALLEST = 1 << 18  # weights; a model of smaller layers is a toy, not worth the wait for the compiler
_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "AVX512_VNNI": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


class _Problem(ctypes.Structure):
    """``struct Problem`` of cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qweight", "qzeros", "scales", "offsets", "lora_a", "lora_b", "out")),
        *((name, ctypes.c_int64) for name in ("rank", "groups", "group_size", "n")),
        ("scaling", ctypes.c_float),
        ("zero_shift", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("bits", "half_scales", "bfloat16_out", "threads")),
    )


def takes(packed: PackedWeight, dtype: torch.dtype) -> bool:
    """Whether :func:`fill` is the way for this weight: a large one on a CPU, words and groups aligned."""
    return (
        packed.qweight.device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and packed.bits != 3
        and packed.g_idx is None
        and packed.group_size % codes_per_period(packed.bits) == 0
        and packed.in_features * packed.out_features >= SMALLEST
        and library() is not None
    )


def fill(packed: PackedWeight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, out: Tensor) -> None:
    """Write the effective weight, offsets and adapter included, to ``out`` ``[K, N]``."""
    half = packed.scales.dtype == torch.float16
    # Named, so that they live until the call is over.
    scales = packed.scales if half else packed.scales.float()
    offsets = None if packed.offsets is None else packed.offsets.float()
    a, b = (None if t is None else t.float().contiguous() for t in (lora_a, lora_b))
    tensors = packed.qweight, packed.qzeros, scales, offsets, a, b, out
    problem = _Problem(
        *(None if t is None else t.data_ptr() for t in tensors),
        0 if a is None else len(a), packed.groups, packed.group_size, packed.out_features,
        scaling, zero_shift(packed.bits, packed.checkpoint_format),
        packed.bits, half, out.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    library().qalora_fill(ctypes.byref(problem))


@functools.cache
def library() -> ctypes.CDLL | None:
    """cpu.cpp, compiled for this CPU; None, and one warning, where that does not work."""
    from torch.utils.cpp_extension import load  # slow to import, and only needed here

    capability = torch.backends.cpu.get_cpu_capability()
    try:
        with _ninja_on_path():
            path = load(
                name=f"qalora_cpu_{capability.lower()}",  # a cache in a shared home serves different machines
                sources=[str(Path(__file__).with_suffix(".cpp"))],
                extra_cflags=["-O3", "-fopenmp", *_FLAGS.get(capability, [])],
                extra_ldflags=["-fopenmp"],  # the libgomp that torch has loaded: one pool of threads
                is_python_module=False,
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "qalora: could not compile the CPU kernel (%s); training works, slower. Install g++ for full speed.",
            str(error).strip().splitlines()[0],
        )
        return None
    return ctypes.CDLL(path)


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """torch looks for ninja on PATH, where an environment that was not activated does not put its own."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = f"{before}{os.pathsep}{sysconfig.get_path('scripts')}"
    try:
        yield
    finally:
        os.environ["PATH"] = before
