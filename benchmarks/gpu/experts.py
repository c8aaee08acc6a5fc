"""One projection of stacked experts: the grouped Triton kernels, one expert after the other, and dense weights.

Microseconds, over weights in turn. ``grouped`` and ``dense`` (``torch._grouped_mm`` on bfloat16 weights: a limit) run
in a CUDA graph; ``one by one`` cannot, since it waits for the counts. ``limit_us`` is what the bytes of the weights
that are routed to, x and y take at the memory's measured speed. ``backward``: dx and the gradients of an adapter.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from gpu.record import CUDA, DEVICE, Record, part_arguments, reading
from gpu.timing import gigabytes_per_second, microseconds
from torch import Tensor

from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels import autograd, grouped
from qalora_plugin.kernels.triton.grouped import Tiles

NAMES = ["shape", "experts", "chosen", "tokens", "way", "direction", "us", "limit_us", "error", "note"]
SHAPES = [(2048, 768, 128, 8), (4096, 14336, 8, 2)]  # Qwen3-30B-A3B, Mixtral: K, N, experts, of which a token takes
TOKENS = [1, 8, 64, 512, 4096]
RANK, GROUP_SIZE, COPIES = 16, 32, 2
SCALE = 0.0043


def stacked(k: int, n: int, experts: int, dtype: torch.dtype) -> GroupwiseWeight:
    groups = k // GROUP_SIZE
    words = torch.empty(experts, k // 8, n, dtype=torch.int32, device=DEVICE).random_(-(2**31), 2**31)
    zeros = torch.full((experts, groups, n), 8, dtype=torch.uint8, device=DEVICE)
    scales = torch.empty(experts, groups, n, device=DEVICE).uniform_(0.9 * SCALE, 1.1 * SCALE).to(dtype)
    offsets = torch.empty(experts, groups, n, device=DEVICE).normal_(0, 4e-4).half()
    return GroupwiseWeight.of([words, zeros, scales, offsets, None, None], 4, GROUP_SIZE)


def one_by_one(x: Tensor, weight: GroupwiseWeight, chosen: Tensor, delta: OffsetDelta | None) -> Tensor:
    slots = chosen.flatten()
    order = slots.argsort(stable=True)
    counts = torch.bincount(slots, minlength=len(weight.scales)).tolist()
    parts = []
    for e, part in enumerate(x[order // chosen.shape[1]].split(counts)):
        if len(part):
            own = None if delta is None else OffsetDelta(delta.lora_a[e], delta.lora_b[e], delta.scaling)
            parts.append(autograd.linear(part, weight.expert(e), own))
    return torch.cat(parts)[order.argsort()]


def together(x: Tensor, weight: GroupwiseWeight, chosen: Tensor, delta: OffsetDelta | None) -> Tensor:
    return grouped.linear(x, weight, Tiles.of(chosen, len(weight.scales)), delta)


def waiting_microseconds(call: Callable[[], object], repeats: int) -> float:
    """Of a function that a graph cannot hold: its launches and its waiting count."""
    samples = []
    for _ in range(repeats + 2):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        samples.append(1e6 * (time.perf_counter() - start))
    return statistics.median(samples[2:])


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def trained(function: Callable, x: Tensor, weight: GroupwiseWeight, chosen: Tensor) -> Callable[[], object]:
    """Forward and backward with an adapter on every expert."""
    experts, groups, n = weight.scales.shape
    lora_a = torch.randn(experts, RANK, groups, device=DEVICE, requires_grad=True)
    lora_b = torch.randn(experts, n, RANK, device=DEVICE, requires_grad=True)
    x = x.detach().requires_grad_()
    dy = torch.randn(chosen.numel(), n, device=DEVICE, dtype=x.dtype)

    def step() -> None:
        torch.autograd.grad(function(x, weight, chosen, OffsetDelta(lora_a, lora_b, 1.0)), (x, lora_a, lora_b), dy)

    return step


def compare(record: Record, shape: tuple[int, int, int, int], all_tokens: list[int], dtype: torch.dtype) -> None:
    k, n, experts, per_token = shape
    weights = [stacked(k, n, experts, dtype) for _ in range(COPIES)]
    speed = gigabytes_per_second()
    for tokens in all_tokens:
        x = torch.randn(tokens, k, device=DEVICE).to(dtype)
        chosen = torch.rand(tokens, experts, device=DEVICE).topk(per_token).indices
        routed = len(chosen.unique())
        moved = routed * k * n * (0.5 + 5 / GROUP_SIZE) + 2 * tokens * per_token * (k + n)
        about = {"shape": f"{k}x{n}", "experts": experts, "chosen": per_token, "tokens": tokens}
        wanted = one_by_one(x.double(), weights[0], chosen, None)
        for way, function in (("grouped", together), ("one by one", one_by_one)):
            calls = [partial(function, x, weight, chosen, None) for weight in weights]
            timed = partial(microseconds, calls, 10) if way == "grouped" else partial(waiting_microseconds, calls[0], 5)
            found = reading(way, lambda timed=timed: {"us": timed()})
            found |= reading(way, lambda call=calls[0], wanted=wanted: {"error": error(call(), wanted)})
            limit = moved / speed / 1e3 if speed else ""
            record.add(**about, way=way, direction="forward", **found, limit_us=limit)
            if tokens == all_tokens[-1]:
                step = trained(function, x, weights[0], chosen)
                found = reading(way, lambda step=step: {"us": waiting_microseconds(step, 5)})
                record.add(**about, way=way, direction="forward and backward", **found)
        if CUDA and dtype == torch.bfloat16:
            dense = torch.randn(experts, k, n, device=DEVICE, dtype=dtype)
            counts = torch.bincount(chosen.flatten(), minlength=experts)
            rows, ends = x.repeat_interleave(per_token, 0), counts.cumsum(0).to(torch.int32)
            call = partial(torch._grouped_mm, rows, dense, offs=ends)
            found = reading("dense", lambda call=call: {"us": microseconds([call], 10)})
            record.add(**about, way="dense", direction="forward", **found)


def main() -> None:
    arguments = part_arguments(__doc__)
    record = Record(arguments.out / "gpu_experts.csv", NAMES)
    torch.manual_seed(0)
    for shape in [(64, 96, 4, 2)] if arguments.tiny else SHAPES:
        # The interpreter's products are wrong in bfloat16, whose numbers it takes for integers.
        compare(record, shape, [1, 5] if arguments.tiny else TOKENS, torch.bfloat16 if CUDA else torch.float16)


if __name__ == "__main__":
    main()
