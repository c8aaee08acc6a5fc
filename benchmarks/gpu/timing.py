"""Microseconds of a function on the GPU, launches included as they count inside a CUDA graph."""

import statistics
import time
from collections.abc import Callable

import torch
from gpu.record import CUDA

COPIES = 8  # of every weight, used in turn, so that none stays in the cache between two calls


def microseconds(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median time of one of ``calls``, equal functions on different data, run one after the other in one graph."""
    for call in calls:
        call()
    if not CUDA:
        start = time.perf_counter()
        for call in calls:
            call()
        return 1e6 * (time.perf_counter() - start) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    samples = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(samples[2:])


def gigabytes_per_second() -> float:
    """Of device memory: a large copy, bytes read plus bytes written."""
    if not CUDA:
        return 0.0
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: target.copy_(source)], 10) / 1e3
