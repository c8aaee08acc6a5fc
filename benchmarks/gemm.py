"""What does the second term cost beside the kernel, for one linear?

    python benchmarks/gemm.py             a few shapes on a CPU, the whole grid with CUDA
    python benchmarks/gemm.py --shapes 4096x4096 --rows 1 16 --group-sizes 128

Microseconds, medians over interleaved repeats (with CUDA: of a replayed CUDA graph, so launches count as they do in
vLLM), of x [M, K] times one symmetric 4-bit weight [K, N]:

    kernel     vLLM's kernel alone: what the stock base costs (Machete or Marlin with CUDA)
    marlin     Marlin, where it is not that kernel already
    offsets    kernel, then ``qalora_add_offsets`` in place
    fused      the offsets inside the kernel's float zero-points, where this machine can
    bf16       the dense matrix product (cuBLAS, oneDNN)
    bytes      with CUDA: the time that reading the weight, x, y and the offsets takes at the memory's full speed
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

import torch
import vllm.envs
from report import RESULTS, print_table, verdict, write_csv
from serving_models import quantised
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

import vllm_ext
from vllm_ext.kernels.vllm import NoKernel, find_float_zero_kernel, find_kernel, hand_over
from vllm_ext.ops import add_offsets, prepare

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = ["4096x4096", "4096x11008", "11008x4096", "8192x28672"] if CUDA else ["1024x1024", "1024x5632", "4096x4096"]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096] if CUDA else [1, 8, 32, 128, 512]
COPIES = 8  # of every weight on a GPU, used in turn, so that none stays in the cache between two calls
BARS = {128: {1: 0.08, 128: 0.03}, 32: {1: 0.15, 128: 0.05}}  # group size → rows (and more) → added share


def layer_of(k: int, n: int, group_size: int) -> nn.Module:
    """A linear's parameters as vLLM has them once they are loaded."""
    tensors = {name: tensor.to(DEVICE) for name, tensor in quantised(k, n, group_size, torch.Generator()).items()}
    same = {"input_dim": 0, "output_dim": 1, "weight_loader": lambda *_: None}
    layer = nn.Module()
    layer.bias = None
    layer.qweight = PackedvLLMParameter(data=tensors["qweight"], packed_dim=0, packed_factor=8, **same)
    layer.scales = GroupQuantScaleParameter(data=tensors["scales"], **same)
    return layer


def candidates(k: int, n: int, group_size: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name → function of x, for one shape."""
    groups, shape = k // group_size, (k, n)
    zeros = torch.full((groups, n), 8, dtype=torch.uint8, device=DEVICE)
    offsets = (1e-3 * torch.randn(groups, n, device=DEVICE)).half()

    def built(find: Callable, inside: torch.Tensor | None = None) -> Callable:
        functions = []
        for _ in range(COPIES if CUDA else 1):
            kernel, layer = find(), layer_of(k, n, group_size)
            if inside is None:
                hand_over(kernel, layer, zeros, 4)
            else:
                kernel.hand_over(layer, zeros, 4, inside)
            functions.append(partial(kernel.apply_weights, layer))
        return in_turn(functions)

    found = {"kernel": built(lambda: find_kernel(4, False, group_size, torch.bfloat16, shape, shape))}
    prepared = [prepare(offsets.clone(), torch.bfloat16, group_size) for _ in range(COPIES if CUDA else 1)]
    add = in_turn([lambda pair, values=values: add_offsets(*pair, values, group_size) for values in prepared])

    def with_offsets(x: torch.Tensor) -> torch.Tensor:
        y = found["kernel"](x)
        add((y, x))
        return y

    found["offsets"] = with_offsets
    try:
        found["fused"] = built(lambda: find_float_zero_kernel(4, group_size, torch.bfloat16, shape, shape), offsets)
    except NoKernel as reason:
        print(f"no fused path for {k}x{n}, group size {group_size}: {reason}")
    if CUDA and torch.cuda.get_device_capability() == (9, 0):
        vllm.envs.VLLM_DISABLED_KERNELS = ["MacheteLinearKernel"]
        found["marlin"] = built(lambda: find_kernel(4, False, group_size, torch.bfloat16, shape, shape))
        vllm.envs.VLLM_DISABLED_KERNELS = []
    dense = [torch.randn(n, k, device=DEVICE).bfloat16() for _ in range(COPIES if CUDA else 1)]
    found["bf16"] = in_turn([lambda x, weight=weight: nn.functional.linear(x, weight) for weight in dense])
    return found


def in_turn(functions: list[Callable]) -> Callable:
    """Calls one after another of equal functions."""
    calls = 0

    def call(argument):
        nonlocal calls
        calls += 1
        return functions[calls % len(functions)](argument)

    return call


def timer(function: Callable, x: torch.Tensor) -> Callable[[], float]:
    """A function that runs once and returns microseconds."""
    for _ in range(COPIES):
        function(x)
    if not CUDA:

        def once() -> float:
            start = time.perf_counter()
            function(x)
            return 1e6 * (time.perf_counter() - start)

        return once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(COPIES):
            function(x)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / COPIES

    return replay


def byte_limit(m: int, k: int, n: int, group_size: int, gigabytes_per_s: float) -> float:
    """Microseconds for codes, scales and offsets (16 bits a group each), x and y."""
    return (k * n / 2 + 4 * k * n / group_size + 2 * m * (k + n)) / gigabytes_per_s / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="KxN")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 64, 128] if CUDA else [32, 128])
    parser.add_argument("--repeats", type=int, default=50 if CUDA else 15)
    parser.add_argument("--bandwidth", type=float, help="GB/s of the GPU's memory, for the byte limit")
    parser.add_argument("--results", type=Path, default=RESULTS / f"gemm_{DEVICE}.csv")
    arguments = parser.parse_args()
    vllm_ext.register()
    rows = []
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", local_rank=0, backend="nccl" if CUDA else "gloo")
        initialize_model_parallel(1, 1)
        for shape in arguments.shapes:
            k, n = map(int, shape.split("x"))
            for group_size in arguments.group_sizes:
                functions = candidates(k, n, group_size)
                for m in arguments.rows:
                    x = torch.randn(m, k, device=DEVICE).bfloat16()
                    timers = {name: timer(function, x) for name, function in functions.items()}
                    samples = {name: [] for name in timers}
                    for _ in range(arguments.repeats):
                        for name, once in timers.items():
                            samples[name].append(once())
                    times = {name: statistics.median(found) for name, found in samples.items()}
                    if arguments.bandwidth:
                        times["bytes"] = byte_limit(m, k, n, group_size, arguments.bandwidth)
                    rows.append({"shape": shape, "group_size": group_size, "rows": m, **times})
    names = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in names} for row in rows]
    print_table([*names, "added by offsets"], [[*row.values(), added(row)] for row in rows])
    write_csv(arguments.results, rows, "vllm")


def added(row: dict) -> str:
    """The offsets' share of the kernel's time, against the bar where one is set."""
    share = row["offsets"] / row["kernel"] - 1
    bars = BARS.get(row["group_size"], {})
    bar = bars.get(1 if row["rows"] == 1 else 128 if row["rows"] >= 128 else 0)
    return verdict(share, bar, at_least=False) if bar and CUDA else f"{share:.3f}"


if __name__ == "__main__":
    main()
