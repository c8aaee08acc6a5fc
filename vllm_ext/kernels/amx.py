"""AMX, the tile registers of Intel's CPUs since Sapphire Rapids: permission to use them, and which path is faster.

A process may use the registers once it has asked Linux. oneDNN asks when it first multiplies; where every linear of a
model runs on torch's int4 kernel, nothing of oneDNN may have run before vLLM's attention uses them, and the process
would die of an illegal instruction.

There vLLM's own kernel multiplies with them and torch's int4 kernel does not, so that ``fused-zeros`` need not be the
faster path: it is found out by timing one linear, once for a machine and version. (That is, where vLLM multiplies in
bfloat16. Unless VLLM_CPU_INT4_W4A8=0 tells it to, it multiplies in INT8, and is not compared.)
"""

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor, nn

from qalora_plugin.checkpoint.replacing import replace_text
from qalora_plugin.core.private_cache import private_folder
from vllm_ext.compat import Layer

logger = logging.getLogger("vllm.qalora")

_SIZE = 2048  # K and N of the linear that is timed
_ROWS = (1, 8, 32)  # requests at a time; they count alike
_REPEATS = 20
_PATHS = ("fused-zeros", "kernel+offsets")


def has_amx() -> bool:
    """Whether this CPU has AMX."""
    return torch.cpu._is_amx_tile_supported()


@cache
def request() -> bool:
    """Ask Linux for AMX, for all threads of this process; True if it has it now."""
    if not has_amx():
        return False
    granted = torch.cpu._init_amx()
    if not granted:
        logger.warning("qalora: Linux does not grant AMX to this process")
    return granted


def faster_path(group_size: int, code: str) -> str:
    """The faster one of both paths on this machine, timed at the first call and remembered.

    Args:
        group_size: one that both take. code: a hash of this package, whose versions differ.
    """
    import vllm  # not above: the ops of this package can be tested and timed where vLLM is not

    folder = private_folder("paths")
    machine = (torch.__config__.show(), torch.get_num_threads(), os.cpu_count(), _cpu_name())
    key = hashlib.sha256(repr((group_size, code, vllm.__version__, machine)).encode()).hexdigest()[:16]
    if folder is not None:
        with suppress(OSError):
            if (found := (folder / key).read_text()) in _PATHS:
                return found
    fused, separate = (_seconds(linear) for linear in _linears(group_size))
    gain = math.prod(b / a for a, b in zip(fused, separate, strict=True)) ** (1 / len(_ROWS))
    path = _PATHS[0] if gain >= 1 else _PATHS[1]
    logger.info("qalora: fused-zeros takes %.2f of the time of kernel+offsets on this CPU: %s", 1 / gain, path)
    if folder is not None:
        with suppress(OSError):
            replace_text(folder / key, path)
    return path


def _linears(group_size: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """One random linear, by either path.

    Raises:
        NoKernel: one of them is not to be had.
    """
    from vllm_ext.kernels.cpu_int4 import Int4PackKernel
    from vllm_ext.kernels.vllm import find_kernel, hand_over
    from vllm_ext.ops import add_offsets, prepare

    shape, groups = (_SIZE, _SIZE), _SIZE // group_size
    offsets = torch.randn(groups, _SIZE) / _SIZE
    zeros = torch.full((groups, _SIZE), 8, dtype=torch.uint8)
    fused = Int4PackKernel(shape, group_size)
    theirs = find_kernel(4, False, group_size, torch.bfloat16, shape, shape)
    words = torch.randint(-(2**31), 2**31, (_SIZE // 8, _SIZE), dtype=torch.int32)
    layers = _layer(words, groups), _layer(words, groups)
    fused.hand_over(layers[0], zeros, 4, offsets)
    hand_over(theirs, layers[1], zeros, 4)
    prepared = prepare(offsets, torch.bfloat16, group_size)

    def separate(x: Tensor) -> Tensor:
        y = theirs.apply_weights(layers[1], x)
        add_offsets(y, x, prepared, group_size)
        return y

    return lambda x: fused.apply_weights(layers[0], x), separate


def _layer(words: Tensor, groups: int) -> Layer:
    """Weights as they are loaded, with what vLLM's kernels ask of its parameters."""
    layer: Layer = nn.Module()
    layer.qweight = nn.Parameter(words.clone(), requires_grad=False)
    layer.scales = nn.Parameter(torch.full((groups, _SIZE), 0.01, dtype=torch.bfloat16), requires_grad=False)
    for parameter in (layer.qweight, layer.scales):
        parameter.input_dim, parameter.output_dim = 0, 1
    layer.qweight.packed_dim = 0
    layer.bias = None
    return layer


def _seconds(linear: Callable[[Tensor], Tensor]) -> list[float]:
    """The best time for each number of rows."""
    best = []
    for rows in _ROWS:
        x, times = torch.randn(rows, _SIZE).bfloat16(), []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            linear(x)
            times.append(time.perf_counter() - start)
        best.append(min(times))
    return best


def _cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        return next((line for line in lines if line.startswith("model name")), "")
    return ""
