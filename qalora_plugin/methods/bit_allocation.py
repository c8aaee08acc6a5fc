"""Bits and group size of every layer under one budget: LQ-LoRA's integer program (arXiv 2311.12023, section 3.2).

    minimize Σ cost[i,c]·x[i,c]    so that    Σ_c x[i,c] = 1,    Σ size[i,c]·x[i,c] ≤ budget·Σ weights[i]

x is binary; a choice c is a pair (bits, group size). Linears that a server runs as one (q, k, v; gate, up) are one
layer i, so that they end up alike. Solved by HiGHS through scipy: a model of 70B in seconds.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qalora_plugin.conversion.added import merged_spec
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.core.words import SUPPORTED_BITS
from qalora_plugin.formats.served_bits import served_bits

GROUP_SIZES = (32, 64, 128)
_RANK = 16  # of the adapter whose offsets count
_GAP = 1e-4  # of the cost: how far from the best a solution may be
_PATIENCE = 60.0  # seconds


class Choice(NamedTuple):
    """How a linear may be quantized."""

    bits: int
    group_size: int


def choices_of(group_sizes: Collection[int]) -> tuple[Choice, ...]:
    """All bits at each of these group sizes."""
    return tuple(Choice(bits, group_size) for bits in SUPPORTED_BITS for group_size in group_sizes)


CHOICES = choices_of(GROUP_SIZES)


@dataclass(frozen=True)
class Layer:
    """Linears that are quantized alike.

    Attributes:
        names: of the linears. shapes: ``(N, K)`` of each.
        costs: of every choice that their shapes allow, in any unit that adds up over layers.
        act_order: the group of every column is stored, too.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    costs: Mapping[Choice, float]
    act_order: bool = False

    @property
    def weights(self) -> int:
        """How many numbers they hold."""
        return sum(rows * columns for rows, columns in self.shapes)

    def bits(self, choice: Choice) -> int:
        """All that serving them takes once an adapter of rank 16 is merged, without trained scales: its offsets are
        dense or two factors, whichever is smaller.
        """
        bases = [GroupwiseSpec("", columns, rows, *choice, has_g_idx=self.act_order) for rows, columns in self.shapes]
        merged = (merged_spec(base, _RANK, "float16") for base in bases)
        return sum(served_bits(merged, self.act_order).bits.values())


def allocate(layers: Sequence[Layer], budget: float) -> dict[str, Choice]:
    """The choice of every linear, by name, that costs least within ``budget`` bits a weight, all included.

    Raises:
        QALoraError: no choice meets the budget (the message says the nearest), or none was found in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    total = sum(layer.weights for layer in layers)
    require_possible(layers, budget)
    pairs = [(i, choice) for i, layer in enumerate(layers) for choice in layer.costs]
    costs = np.array([layers[i].costs[choice] for i, choice in pairs], dtype=np.float64)
    sizes = np.array([layers[i].bits(choice) / total for i, choice in pairs])
    of_layer = csr_array((np.ones(len(pairs)), ([i for i, _ in pairs], range(len(pairs)))))
    # Of the least there is: in parts of the largest, all but one layer's may be less than HiGHS can tell from zero.
    unit = sum(min(layer.costs.values()) for layer in layers) or costs.max() or 1.0
    found = milp(
        costs / unit,
        constraints=[LinearConstraint(of_layer, 1, 1), LinearConstraint(sizes[None], -np.inf, budget)],
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": _GAP, "time_limit": _PATIENCE},
    )
    if found.x is None:
        raise QALoraError(
            f"no allocation of {budget} bits was found in {_PATIENCE:.0f} s ({found.message}). Use another budget."
        )
    chosen = {i: choice for (i, choice), taken in zip(pairs, found.x, strict=True) if taken > 0.5}
    return {name: chosen[i] for i, layer in enumerate(layers) for name in layer.names}


def bits_a_weight(layers: Sequence[Layer], chosen: Mapping[str, Choice]) -> float:
    """Bits a weight of an allocation, all included."""
    return sum(layer.bits(chosen[layer.names[0]]) for layer in layers) / sum(layer.weights for layer in layers)


def require_possible(layers: Sequence[Layer], budget: float) -> None:
    """
    Raises:
        QALoraError: no choice meets the budget (the message says the nearest).
    """
    total = sum(layer.weights for layer in layers)
    for layer in layers:
        if not layer.costs:
            raise QALoraError(
                f"{layer.names[0]} fits no group size that may be chosen. Give bits and group_size instead of a budget."
            )
    least, most = (sum(pick(map(layer.bits, layer.costs)) for layer in layers) / total for pick in (min, max))
    if not budget >= least:  # NaN, too
        raise QALoraError(
            f"a budget of {budget} bits a weight cannot be met: the smallest choice everywhere takes "
            f"{math.ceil(least * 100) / 100:.2f}, the largest {most:.2f} (codes, scales, zero-points and offsets). Use "
            "a budget between the two."
        )
