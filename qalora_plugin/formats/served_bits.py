"""What quantized linears take when they are served: bits a weight, all included.

Counted is what every format here stores of a linear: codes and zero-points packed, scales, offsets and changes of
scales in their own dtypes, and in act-order the group of every column. A bias is not counted, since the 16-bit model
has it, too; nor is what is left dense (embeddings, norms, a head), which quantizing does not change.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from qalora_plugin.core.weight import GroupwiseSpec

_DTYPE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}
INDEX_BITS = 32  # of a column's group


@dataclass(frozen=True)
class SizeReport:
    """Sizes of quantized linears.

    Attributes:
        weights: how many weights K·N they have in all.
        bits: what they take, in bits, by part (``"codes"``, ``"scales"``, ``"zeros"`` …), parts of 0 left out.
    """

    weights: int
    bits: dict[str, int] = field(default_factory=dict)

    @property
    def bits_a_weight(self) -> float:
        """All parts, divided by the weights; 0 of none."""
        return sum(self.bits.values()) / self.weights if self.weights else 0.0

    @property
    def nbytes(self) -> int:
        return sum(self.bits.values()) // 8

    def plus(self, part: str, bits: int) -> "SizeReport":
        """The same with something beside, such as the factors of an adapter that is served unmerged."""
        return SizeReport(self.weights, {**self.bits, part: self.bits.get(part, 0) + bits})

    def __str__(self) -> str:
        parts = " + ".join(f"{bits / self.weights:.3g} {part}" for part, bits in self.bits.items())
        return f"{self.bits_a_weight:.3f} bits a weight ({parts})" if self.weights else "no quantized weights"


def served_bits(specs: Iterable[GroupwiseSpec], act_order: bool = False) -> SizeReport:
    """Sum of the linears' sizes.

    Args:
        specs: from a checkpoint's headers, or of what a merge will write.
        act_order: count the group of every column, where it is stored; in order it is stored by many tools, and
            served by none.
    """
    weights, bits = 0, Counter[str]()
    for spec in specs:
        each = spec.groups * spec.out_features
        weights += spec.in_features * spec.out_features
        bits["codes"] += spec.bits * spec.in_features * spec.out_features
        bits["scales"] += dtype_bits(spec.scale_dtype) * each
        bits["zeros"] += spec.bits * each
        bits["offsets"] += offset_bits(spec)
        bits["scales_delta"] += dtype_bits(spec.scales_delta_dtype) * each
        bits["column order"] += INDEX_BITS * spec.in_features if act_order and spec.has_g_idx else 0
    return SizeReport(weights, {part: count for part, count in bits.items() if count})


def kinds(specs: Collection[GroupwiseSpec]) -> tuple[str, ...]:
    """How linears are quantized and how many of each kind there are: ``"6 × 4 bit, g 32"``."""
    found = Counter(f"{spec.bits} bit, g {spec.group_size}" for spec in specs)
    return tuple(f"{count} × {kind}" for kind, count in found.items())


def offset_bits(spec: GroupwiseSpec) -> int:
    """Of one linear's offsets, in the form and dtype that its spec says: ``G·N``, or factors of ``r·(G + N)``."""
    if spec.offset_rank:
        each = 32 * spec.groups + dtype_bits(spec.offset_dtype) * spec.out_features
        return spec.offset_rank * each
    return dtype_bits(spec.offset_dtype) * spec.groups * spec.out_features


def dtype_bits(dtype: str | None) -> int:
    """Bits of a number, by torch's name of its dtype; 0 for None."""
    return 0 if dtype is None else _DTYPE_BITS[dtype]
