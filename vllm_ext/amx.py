"""AMX, the tile registers of Intel's CPUs since Sapphire Rapids: a process may use them once it has asked Linux.

oneDNN asks when it first multiplies. Where every linear of a model runs on torch's int4 kernel, nothing of oneDNN may
have run before vLLM's attention uses the registers, and the process would die of an illegal instruction.
"""

import ctypes
import logging
import os
import platform
from functools import cache
from pathlib import Path

logger = logging.getLogger("vllm.qalora")

_CPUINFO = Path("/proc/cpuinfo")
_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 0x1023, 18  # linux: arch/x86/include/uapi/asm/prctl.h


def has_amx() -> bool:
    """Whether this CPU has AMX, by what Linux says of it."""
    if platform.machine() != "x86_64" or not _CPUINFO.is_file():
        return False
    with open(_CPUINFO) as lines:
        return "amx_tile" in next((line for line in lines if line.startswith("flags")), "").split()


@cache
def request() -> bool:
    """Ask Linux for AMX, for all threads of this process; True if it has it now."""
    if not has_amx():
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
        return True
    logger.warning("qalora: Linux does not grant AMX (%s)", os.strerror(ctypes.get_errno()))
    return False
