"""Stacked experts on CUDA: every token by the packed weights of its expert, in one launch (:mod:`.grouped_kernels`).

A *slot* is one of the k choices of a token, ``s = token·k + choice``. Kernels read and write in the order of slots and
are told by :class:`Tiles` which ones an expert has, so nothing is sorted or copied and no count goes to the CPU: a CUDA
graph holds it all.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.kernels.triton.dequantize import layout_constants
from qalora_plugin.kernels.triton.grouped_kernels import (
    multiply_kernel,
    multiply_t_kernel,
    outer_kernel,
    pool_kernel,
    product_kernel,
)

FEWEST, MOST = 16, 128  # rows of a tile: what tensor cores take, and what registers hold
COLUMNS, DEPTH = 64, 64  # of a tile: outputs, and what is summed over in a step
GROUPS_OF_POOL = 32


class Tiles(NamedTuple):
    """Slots by expert, those of each filled up to whole tiles. (What vLLM's ``moe_align_block_size`` finds.)

    Attributes:
        slots: int32 ``[tiles·block]``, S where a tile is filled up.
        experts: int32 ``[tiles]``, whose each tile is.
        used: int32 ``[1]``: ``slots`` that count; tiles beyond are empty.
        block: rows of a tile. size: S, of all slots.
    """

    slots: Tensor
    experts: Tensor
    used: Tensor
    block: int
    size: int

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Tiles":
        """chosen: ``[T, k]``, an expert each. Nothing here waits for the GPU."""
        flat = chosen.flatten()
        count, block = len(flat), block_of(len(flat), experts)
        tiles = count // block + min(experts, count)  # no fewer than there can be
        sizes = torch.zeros(experts, dtype=torch.int64, device=flat.device)
        sizes.scatter_add_(0, flat, torch.ones_like(flat))
        each = (sizes + block - 1) // block
        ends = each.cumsum(0)  # in tiles
        order = flat.argsort(stable=True)
        of_expert = flat[order]
        before = sizes.cumsum(0) - sizes
        starts = (ends - each) * block
        place = torch.arange(count, device=flat.device) - before[of_expert] + starts[of_expert]
        slots = flat.new_full((tiles * block,), count, dtype=torch.int32)
        slots[place] = order.to(torch.int32)
        owners = torch.searchsorted(ends, torch.arange(tiles, device=flat.device), right=True)
        owners = owners.clamp_(max=experts - 1).to(torch.int32)
        return cls(slots, owners, (ends[-1:] * block).to(torch.int32), block, count)

    def owners(self) -> Tensor:
        """int32 ``[S]``: each slot's expert."""
        found = self.experts.new_empty(self.size + 1)
        return found.scatter_(0, self.slots.long(), self.experts.repeat_interleave(self.block))[:-1]


def block_of(slots: int, experts: int) -> int:
    """Rows of a tile: about what an expert has if all have alike."""
    return min(MOST, max(FEWEST, triton.next_power_of_2(slots // experts)))


def multiply(x: Tensor, weight: GroupwiseWeight, offsets: Tensor | None, tiles: Tiles) -> Tensor:
    """``[S, N]``, each slot's row of x by its expert's weight, with ``offsets`` ``[E, G, N]`` instead of its own.

    Args:
        x: ``[T, K]``, a row for each token, or ``[S, K]``.
    """
    n = weight.out_features
    out = x.new_empty(tiles.size, n)
    blocks = weight_blocks(weight)
    with torch.cuda.device_of(x):  # Triton launches on the current device, whichever its tensors are on
        multiply_kernel[(len(tiles.experts), triton.cdiv(n, COLUMNS))](
            x.contiguous(), out, *tiles[:3], *tensors_of(weight, offsets), tiles.size, _per_row(x, tiles),
            weight.in_features, n, weight.group_size,
            HAS_OFFSETS=offsets is not None, **blocks, **rows(tiles),
        )  # fmt: skip
    return out


def multiply_t(dy: Tensor, weight: GroupwiseWeight, offsets: Tensor | None, tiles: Tiles) -> Tensor:
    """``dy·w'ᵀ``, ``[S, N] → [S, K]``."""
    k = weight.in_features
    out = dy.new_empty(tiles.size, k)
    blocks = weight_blocks(weight)
    with torch.cuda.device_of(dy):
        multiply_t_kernel[(len(tiles.experts), triton.cdiv(k, blocks["PERIODS"] * blocks["PERIOD"]))](
            dy.contiguous(), out, *tiles[:3], *tensors_of(weight, offsets), tiles.size, k, weight.out_features,
            weight.group_size, HAS_OFFSETS=offsets is not None, **blocks, **rows(tiles),
        )  # fmt: skip
    return out


def product(x: Tensor, m: Tensor, tiles: Tiles) -> Tensor:
    """``[S, N]``, each slot's row of x ``[T or S, I]`` times its expert's ``m`` ``[E, I, N]``, of any strides."""
    inner, n = m.shape[1:]
    out = x.new_empty(tiles.size, n)
    with torch.cuda.device_of(x):
        product_kernel[(len(tiles.experts), triton.cdiv(n, COLUMNS))](
            x.contiguous(), m, out, *tiles[:3], tiles.size, _per_row(x, tiles), inner, n, *m.stride(),
            DEPTH=_wide(inner), COLUMNS=COLUMNS, **rows(tiles),
        )  # fmt: skip
    return out


def outer(x: Tensor, dy: Tensor, experts: int, tiles: Tiles) -> Tensor:
    """``Σ xᵀ·dy`` over each expert's slots: x ``[T or S, I]``, dy ``[S, N]`` → ``[E, I, N]``, float32."""
    inner, n = x.shape[1], dy.shape[1]
    out = x.new_empty(experts, inner, n, dtype=torch.float32)
    depth = _wide(inner)
    with torch.cuda.device_of(x):
        outer_kernel[(experts, triton.cdiv(inner, depth), triton.cdiv(n, COLUMNS))](
            x.contiguous(), dy.contiguous(), out, tiles.slots, ends_of(tiles, experts), tiles.size, _per_row(x, tiles),
            inner, n, DEPTH=depth, COLUMNS=COLUMNS, **rows(tiles),
        )  # fmt: skip
    return out


def pool(x: Tensor, weight: GroupwiseWeight, tiles: Tiles) -> Tensor:
    """``P_e(x)`` ``[S, G]`` in act-order, by ``weight.group_order`` ``[E, K]``."""
    groups = weight.groups
    out = x.new_empty(tiles.size, groups)
    with torch.cuda.device_of(x):
        pool_kernel[(len(tiles.experts), triton.cdiv(groups, GROUPS_OF_POOL))](
            x.contiguous(), out, *tiles[:3], weight.group_order, tiles.size, _per_row(x, tiles), weight.in_features,
            groups, weight.group_size, ROWS=tiles.block, GROUPS=GROUPS_OF_POOL,
        )  # fmt: skip
    return out


def ends_of(tiles: Tiles, experts: int) -> Tensor:
    """int64 ``[E]``: where in ``tiles.slots`` each expert's end."""
    mine = torch.arange(len(tiles.experts), device=tiles.slots.device) * tiles.block < tiles.used
    sizes = torch.zeros(experts, dtype=torch.int64, device=tiles.slots.device)
    return sizes.scatter_add_(0, tiles.experts.long(), mine.long() * tiles.block).cumsum(0)


def rows(tiles: Tiles) -> dict[str, int]:
    """What a launch is told of its tiles."""
    return {"ROWS": tiles.block, "num_warps": warps(tiles.block)}


def warps(block: int) -> int:
    """For a tile of so many rows, within the registers."""
    return 8 if block == MOST else 4


def weight_blocks(weight: GroupwiseWeight) -> dict[str, int]:
    """Constants of the kernels that unpack."""
    period, act_order = codes_per_period(weight.bits), weight.g_idx is not None
    aligned = not act_order and weight.group_size % period == 0
    constants = {"ALIGNED": aligned, "ACT_ORDER": act_order, "PERIODS": DEPTH // period, "COLUMNS": COLUMNS}
    return constants | layout_constants(weight.bits)


def tensors_of(weight: GroupwiseWeight, offsets: Tensor | None) -> tuple[Tensor, ...]:
    """Of the weight as kernels take them; stand-ins, never read, for what it does not have."""
    g_idx = weight.qweight if weight.g_idx is None else weight.g_idx
    return weight.qweight, weight.zeros, weight.scales, weight.scales if offsets is None else offsets, g_idx


def _per_row(x: Tensor, tiles: Tiles) -> int:
    """Slots that share a row of x."""
    return tiles.size // len(x) if len(x) else 1


def _wide(inner: int) -> int:
    return min(DEPTH, max(16, triton.next_power_of_2(inner)))
