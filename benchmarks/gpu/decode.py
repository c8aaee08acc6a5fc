"""A decoding step through blocks of a 7B-shaped Llama, in one CUDA graph: the base, the merged model, a LoRA beside it.

Microseconds a block and sequence count; the linears are fused as vLLM fuses them (q, k, v and gate, up), the norms and
the activation are vLLM's kernels where a bundle brings them, attention reads 512 cached tokens a sequence.

    dense                the 16-bit model         base      the stock kernel (Machete where it takes the group size)
    merged               base, then P(x)·offsets  merged, fused-zeros      offsets inside Machete's float zero-points
    base + LoRA          base, then a second path of rank 16: two small products a linear
"""

from collections.abc import Callable
from functools import partial

import torch
from gpu import stock
from gpu.linear import Subject, with_offsets
from gpu.record import CUDA, DEVICE, Record, part_arguments, reading
from gpu.timing import microseconds
from torch import Tensor
from torch.nn import functional

from vllm_ext import ops

NAMES = ["sequences", "group_size", "path", "us_a_block", "of_base", "note"]
DTYPE, HEADS, CACHED, RANK = torch.bfloat16, 32, 512, 16
Linear = Callable[[Tensor], Tensor]


class Block:
    """One transformer block; ``linears`` are qkv, o, gate_up, down."""

    def __init__(self, hidden: int, linears: list[Linear], has_ops: bool):
        self.qkv, self.o, self.gate_up, self.down = linears
        self.norm = torch.ones(hidden, dtype=DTYPE, device=DEVICE)
        self.has_ops = has_ops

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``[B, hidden] → [B, hidden]``; keys, values ``[B, heads, cached, head size]``."""
        batch, hidden = x.shape
        query, _, _ = self.qkv(self._normed(x)).split(hidden, dim=1)
        query = query.reshape(batch, HEADS if hidden >= 4096 else 2, 1, -1)
        attended = functional.scaled_dot_product_attention(query, keys, values).reshape(batch, hidden)
        x = x + self.o(attended)
        return x + self.down(self._activated(self.gate_up(self._normed(x))))

    def _normed(self, x: Tensor) -> Tensor:
        if not self.has_ops:
            return functional.rms_norm(x, x.shape[-1:], self.norm)
        out = torch.empty_like(x)
        torch.ops._C.rms_norm(out, x, self.norm, 1e-6)
        return out

    def _activated(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        if not self.has_ops:
            return functional.silu(x[:, :half]) * x[:, half:]
        out = x.new_empty(len(x), half)
        torch.ops._C.silu_and_mul(out, x)
        return out


def linear_paths(k: int, n: int, group_size: int, has_ops: bool) -> dict[str, Linear]:
    """One linear by every path, all over one weight."""
    subject = Subject(k, n, group_size, DTYPE)
    dense = subject.dense(offsets=False, dtype=torch.float32).t().contiguous().to(DTYPE)
    paths: dict[str, Linear] = {"dense": lambda x: functional.linear(x, dense)}
    base = paths["dense"]
    if has_ops:
        on_machete = stock.machete_takes(group_size)
        if on_machete:
            base = stock.machete(subject.qweight, subject.scales, group_size)
            zeros = (subject.offsets.float() - 8 * subject.scales.float()).to(DTYPE)
            paths["merged, fused-zeros"] = stock.machete(subject.qweight, subject.scales, group_size, zeros)
        else:
            base = stock.marlin(subject.qweight, subject.scales, k, n)
    paths["base"] = base
    paths["merged"] = partial(with_offsets, base, ops.prepare(subject.offsets, DTYPE, group_size), group_size)
    lora_a, lora_b = (torch.randn(*shape, device=DEVICE).to(DTYPE) for shape in ((RANK, k), (RANK, n)))

    def with_lora(x: Tensor) -> Tensor:
        return base(x).addmm_(functional.linear(x, lora_a), lora_b)

    paths["base + LoRA"] = with_lora
    return paths


def main() -> None:
    arguments = part_arguments(__doc__)
    record, has_ops = Record(arguments.out / "gpu_decode.csv", NAMES), stock.load(arguments.bundle)
    torch.manual_seed(0)
    hidden, inner = (128, 256) if arguments.tiny else (4096, 11008)
    sizes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]
    blocks = 4 if CUDA else 1  # 100 MB of codes each: none is in the cache when its turn comes
    for group_size in (32,) if arguments.tiny else (32, 128):
        built = [[linear_paths(k, n, group_size, has_ops) for k, n in sizes] for _ in range(blocks)]
        for batch in (1, 2) if arguments.tiny else (1, 8, 32, 128):
            heads = 2 if arguments.tiny else HEADS
            shape = (batch, heads, 8 if arguments.tiny else CACHED, hidden // heads)
            keys, values = (torch.randn(shape, device=DEVICE).to(DTYPE) for _ in range(2))
            x = torch.randn(batch, hidden, device=DEVICE).to(DTYPE)
            times = {}
            for name in ("base", *(path for path in built[0][0] if path != "base")):
                models = [Block(hidden, [linear[name] for linear in block], has_ops) for block in built]
                calls = [partial(model, x, keys, values) for model in models]
                found = reading(name, lambda calls=calls: {"us_a_block": microseconds(calls, 20)})
                times[name] = found.get("us_a_block")
                if times["base"] and times[name]:
                    found["of_base"] = times["base"] / times[name]
                record.add(sequences=batch, group_size=group_size, path=name, **found)


if __name__ == "__main__":
    main()
