"""One linear, serving: what the offsets add to the stock kernels, by every path, and how exact each is.

Microseconds in a CUDA graph, over eight weights in turn. ``added`` is against the path's own kernel without offsets;
``limit`` is what the bytes of weight, offsets, x and y take at the memory's measured speed; ``error`` is
‖y − x·w'‖ / ‖x·w'‖ against float64, ``lost`` the same relative to what the offsets add, ‖P(x)·offsets‖.
"""

from collections.abc import Callable
from functools import partial

import torch
from gpu import stock
from gpu.record import CUDA, DEVICE, Record, part_arguments, reading
from gpu.timing import COPIES, gigabytes_per_second, microseconds
from torch import Tensor
from torch.nn import functional

from qalora_plugin.core import reference
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels.triton import dequantize
from vllm_ext import ops

NAMES = ["shape", "group_size", "rows", "dtype", "path", "us", "added_us", "added", "limit_us", "error", "lost", "note"]
SHAPES = [(4096, 4096), (4096, 11008)]
GROUP_SIZES = [128, 32, 64]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
CHECKED = (1, 128)  # rows for which y is compared
_SCALE, _SHIFT = 0.0043, 4e-4  # a step, and offsets of a tenth of it


class Subject:
    """One weight ``[K, N]`` as a checkpoint has it, symmetric, with offsets."""

    def __init__(self, k: int, n: int, group_size: int, dtype: torch.dtype):
        groups = k // group_size
        self.k, self.n, self.group_size = k, n, group_size
        self.qweight = torch.empty(k // 8, n, dtype=torch.int32, device=DEVICE).random_(-(2**31), 2**31)
        self.zeros = torch.full((groups, n), 8, dtype=torch.uint8, device=DEVICE)
        self.scales = torch.empty(groups, n, device=DEVICE).uniform_(0.9 * _SCALE, 1.1 * _SCALE).to(dtype)
        self.offsets = torch.empty(groups, n, device=DEVICE).normal_(0, _SHIFT).half()

    def quantized(self) -> GroupwiseWeight:
        return GroupwiseWeight(
            self.qweight, self.zeros, self.scales, self.offsets, None, None, bits=4, group_size=self.group_size
        )

    def dense(self, offsets: bool, dtype: torch.dtype = torch.float64) -> Tensor:
        weight = self.quantized()
        return reference.dequantize(weight if offsets else weight._replace(offsets=None), dtype)


def paths(subject: Subject, has_ops: bool) -> dict[str, tuple[str | None, Callable[[Tensor], Tensor]]]:
    """Path → (the path that it adds offsets to, its function of x)."""
    dtype = subject.scales.dtype
    found: dict[str, tuple[str | None, Callable[[Tensor], Tensor]]] = {}
    dense = subject.dense(offsets=False, dtype=torch.float32).t().contiguous().to(dtype)
    found["dense"] = None, lambda x: functional.linear(x, dense)
    kernels = {}
    if has_ops:
        kernels["marlin"] = stock.marlin(subject.qweight, subject.scales, subject.k, subject.n)
        if stock.machete_takes(subject.group_size):
            kernels["machete"] = stock.machete(subject.qweight, subject.scales, subject.group_size)
    prepared = ops.prepare(subject.offsets, dtype, subject.group_size)
    for name, kernel in (kernels or {"dense": found["dense"][1]}).items():
        found[name] = None, kernel
        found[f"{name}+offsets"] = name, partial(with_offsets, kernel, prepared, subject.group_size)
    if "machete" in kernels:
        zeros = (subject.offsets.float() - 8 * subject.scales.float()).to(dtype)
        found["fused-zeros"] = "machete", stock.machete(subject.qweight, subject.scales, subject.group_size, zeros)
    if CUDA:
        weight, offsets = subject.quantized(), subject.offsets.float()
        found["triton matmul"] = None, lambda x: dequantize.matmul(x, weight, offsets)
    return found


def with_offsets(kernel: Callable[[Tensor], Tensor], prepared: Tensor, group_size: int, x: Tensor) -> Tensor:
    y = kernel(x)
    ops.add_offsets(y, x, prepared, group_size)
    return y


def exactness(subject: Subject, function: Callable[[Tensor], Tensor], x: Tensor, offsets: bool) -> dict[str, float]:
    wanted = x.double() @ subject.dense(offsets)
    difference = (function(x).double() - wanted).norm()
    found = {"error": (difference / wanted.norm()).item()}
    if offsets:
        g_idx = torch.arange(subject.k, device=DEVICE) // subject.group_size
        added = reference.pool(x.double(), g_idx, len(subject.offsets)) @ subject.offsets.double()
        found["lost"] = (difference / added.norm()).item()
    return found


def limit(k: int, n: int, group_size: int, rows: int, offsets: bool, speed: float) -> float | str:
    """Microseconds for 4-bit codes, 16-bit scales and offsets, x and y."""
    moved = k * n / 2 + (4 if offsets else 2) * k * n / group_size + 2 * rows * (k + n)
    return moved / speed / 1e3 if speed else ""


def main() -> None:
    arguments = part_arguments(__doc__)
    record, has_ops = Record(arguments.out / "gpu_linear.csv", NAMES), stock.load(arguments.bundle)
    torch.manual_seed(0)
    speed = gigabytes_per_second()
    print(f"memory: {speed:.0f} GB/s; stock kernels: {has_ops}", flush=True)
    tiny = arguments.tiny
    for dtype in (torch.bfloat16,) if tiny else (torch.bfloat16, torch.float16):
        for k, n in [(128, 64)] if tiny else SHAPES:
            for group_size in [32] if tiny else GROUP_SIZES:
                all_rows = [1, 40] if tiny else ROWS if dtype == torch.bfloat16 else CHECKED
                compare(record, (k, n, group_size), dtype, all_rows, has_ops, speed)


def compare(
    record: Record, sizes: tuple[int, int, int], dtype: torch.dtype, all_rows: list[int], has_ops: bool, speed: float
) -> None:
    """Rows of one shape, group size and dtype."""
    k, n, group_size = sizes
    subjects = [Subject(k, n, group_size, dtype) for _ in range(COPIES if CUDA else 1)]
    built = [paths(subject, has_ops) for subject in subjects]
    for rows in all_rows:
        x, times = torch.randn(rows, k, device=DEVICE).to(dtype), {}
        for name, (kernel, function) in built[0].items():
            if name == "triton matmul" and rows > dequantize.MAX_TOKENS:
                continue
            offsets = kernel is not None or name == "triton matmul"
            calls = [partial(one[name][1], x) for one in built]
            found = reading(name, lambda calls=calls: {"us": microseconds(calls, 20)})
            times[name] = found.get("us")
            if kernel and times.get(kernel) and times[name]:
                found |= {"added_us": times[name] - times[kernel], "added": times[name] / times[kernel] - 1}
            if rows in CHECKED:
                found |= reading(name, partial(exactness, subjects[0], function, x, offsets))
            found["limit_us"] = limit(k, n, group_size, rows, offsets, speed)
            about = {"shape": f"{k}x{n}", "group_size": group_size, "rows": rows, "path": name}
            record.add(**about, dtype=str(dtype).removeprefix("torch."), **found)


if __name__ == "__main__":
    main()
