"""Training steps of a 7B-shaped model: tokens/s, peak memory, and the three longest kernels; a method in this process.

Started by ``gpu_check.py`` once a method, so that one that fails leaves the others alone.
"""

import os
import statistics
import time
from functools import partial

import torch
from gpu.llama import build, config_of
from gpu.record import CUDA, DEVICE, Record, part_arguments, reading
from torch import nn
from train_step_worker import make_step

NAMES = ["method", "batch", "length", "rank", "group_size", "checkpointing"]
NAMES += ["tokens_per_second", "seconds", "spread", "peak_gb", "loss", "longest", "note"]
# rank, group size → batch, length, checkpointing; in order of worth
SCENARIOS = {
    (16, 32): [(1, 2048, False), (4, 2048, True), (1, 8192, True), (4, 2048, False)],
    (64, 32): [(1, 2048, True)],
    (16, 128): [(1, 2048, False)],
}
TINY = {(4, 32): [(1, 64, False), (2, 32, True)]}
STEPS = 4


def measure(model: nn.Module, tiny: bool, batch: int, length: int, checkpointing: bool) -> dict:
    """Timings of one scenario."""
    if not checkpointing:
        model.gradient_checkpointing_disable()
    step = make_step(model, batch, length, checkpointing, torch.bfloat16, DEVICE)
    for _ in range(1 if tiny else 2):  # the first compiles and fills the caches
        step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(2 if tiny else STEPS):
        start = time.perf_counter()
        loss = step()  # waits for the GPU: it reads the loss, after backward and update were queued
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "tokens_per_second": batch * length / median,
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0,
        "loss": loss,
        "longest": longest(step) if CUDA else "",
    }


def longest(step) -> str:
    """The three kernels that one step spends most time in, with their shares."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    kernels = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    return "; ".join(
        f"{event.key[:60]} ×{event.count} {event.self_device_time_total / total:.1%}" for event in kernels[:3]
    )


def main() -> None:
    arguments, method = part_arguments(__doc__), os.environ["QALORA_CHECK_METHOD"]
    record = Record(arguments.out / f"gpu_train_{method}.csv", NAMES)
    torch.manual_seed(0)
    for (rank, group_size), scenarios in (TINY if arguments.tiny else SCENARIOS).items():
        model = build(method, config_of(arguments.tiny), rank, group_size)
        for batch, length, checkpointing in scenarios:
            scenario = {"batch": batch, "length": length, "rank": rank, "group_size": group_size}
            scenario["checkpointing"] = checkpointing
            found = reading(method, partial(measure, model, arguments.tiny, batch, length, checkpointing))
            record.add(method=method, **scenario, **found)
        del model


if __name__ == "__main__":
    main()
