"""Training steps of a 7B-shaped model: tokens/s, peak memory, and the three longest kernels; a method in this process.

Started by ``gpu_check.py`` once a method, so that one that fails leaves the others alone.
"""

import os
import statistics
import time

import torch
from gpu.llama import build, config_of
from gpu.record import CUDA, DEVICE, Record, part_arguments, reading
from train_step_worker import make_step

NAMES = ["method", "batch", "length", "rank", "group_size", "checkpointing"]
NAMES += ["tokens_per_second", "seconds", "spread", "peak_gb", "loss", "longest", "note"]
# batch, length, rank, group size, checkpointing; in order of worth
SCENARIOS = [
    (1, 2048, 16, 32, False),
    (4, 2048, 16, 32, True),
    (1, 2048, 64, 32, True),
    (1, 8192, 16, 32, True),
    (1, 2048, 16, 128, False),
    (4, 2048, 16, 32, False),
]
TINY = [(1, 64, 4, 32, False), (2, 32, 4, 32, True)]
STEPS = 5


def measure(method: str, tiny: bool, batch: int, length: int, rank: int, group_size: int, checkpointing: bool) -> dict:
    torch.manual_seed(0)
    model = build(method, config_of(tiny), rank, group_size)
    step = make_step(model, batch, length, checkpointing, torch.bfloat16, DEVICE)
    for _ in range(1 if tiny else 2):
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
    for batch, length, rank, group_size, checkpointing in TINY if arguments.tiny else SCENARIOS:
        scenario = {"batch": batch, "length": length, "rank": rank, "group_size": group_size}
        scenario["checkpointing"] = checkpointing
        found = reading(method, lambda scenario=scenario: measure(method, arguments.tiny, **scenario))
        record.add(method=method, **scenario, **found)


if __name__ == "__main__":
    main()
