"""The one currency: a weight quantized in groups, as every format gives it and every kernel, merge, exporter takes it.

    w[k,n] = scales[γ,n]·(q[k,n] − zeros[γ,n]) + offsets[γ,n]          γ = group of column k

Letters: ``K`` in_features, ``N`` out_features, ``g`` group size, ``G = K/g`` groups, ``b`` bits, ``E`` experts.
Needs no torch until a tensor is touched: reading headers, and merging, do without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from qalora_plugin.core.delta import factored_offsets
from qalora_plugin.core.words import codes_per_period, words_per_period

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GroupwiseSpec:
    """What headers say of one quantized linear; dtypes by torch's names for them.

    Attributes:
        name: on disk.
        bits: of a code. group_size: columns of K that share a scale (K itself for one group).
        bias_dtype, offset_dtype, scales_delta_dtype: None where nothing of the kind is stored.
        offset_rank: r where the offsets are stored as two factors, ``[G, r]`` in float32 and ``[r, N]`` in
            ``offset_dtype``; 0 where they are ``[G, N]``.
        has_g_idx: whether the group of every column is stored, which it may be without act-order.
    """

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    scale_dtype: str = "float16"
    bias_dtype: str | None = None
    offset_dtype: str | None = None
    has_g_idx: bool = False
    scales_delta_dtype: str | None = None
    offset_rank: int = 0

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size


class GroupwiseWeight(NamedTuple):
    """Codes as they are packed on disk, everything else plain. Experts may be stacked in front: ``[*E, …]``.

    Attributes:
        qweight: int32 words of b-bit codes along K, ``[*E, K·b/32, N]`` (:mod:`.packing`).
        zeros: true zero-points, uint8 ``[*E, G, N]``.
        scales: ``[*E, G, N]``, float; the ones to multiply by, whatever a checkpoint makes them of.
        offsets: ``[*E, G, N]`` in weight units, or None.
        g_idx: int32 ``[K]``, the group of each column in act-order; None where groups are consecutive.
        group_order: int64 ``[K]``, the columns sorted by group; None likewise.
    """

    qweight: "Tensor"
    zeros: "Tensor"
    scales: "Tensor"
    offsets: "Tensor | None"
    g_idx: "Tensor | None"
    group_order: "Tensor | None"
    bits: int
    group_size: int

    @property
    def groups(self) -> int:
        return self.scales.shape[-2]

    @property
    def in_features(self) -> int:
        return self.groups * self.group_size

    @property
    def out_features(self) -> int:
        return self.scales.shape[-1]

    @property
    def tensors(self) -> "list[Tensor | None]":
        """The six tensors, as ops take them: a custom op knows no classes. :meth:`of` is the way back."""
        return list(self[:6])

    @classmethod
    def of(cls, tensors: "Sequence[Tensor | None]", bits: int, group_size: int) -> "GroupwiseWeight":
        qweight, zeros, scales, offsets, g_idx, group_order = tensors
        assert qweight is not None
        assert zeros is not None
        assert scales is not None
        return cls(qweight, zeros, scales, offsets, g_idx, group_order, bits, group_size)

    def expert(self, i: int) -> "GroupwiseWeight":
        """One of stacked experts."""
        return self._replace(
            qweight=self.qweight[i],
            zeros=self.zeros[i],
            scales=self.scales[i],
            offsets=None if self.offsets is None else self.offsets[i],
        )

    def narrow(self, k: slice | None = None, n: slice | None = None) -> "GroupwiseWeight":
        """Views of the columns ``k`` of K (whole groups, in order) and ``n`` of N.

        Raises:
            ValueError: ``k`` splits a group or a word, or groups are not consecutive.
        """
        columns = slice(None) if n is None else n
        rows, groups = slice(None), slice(None)
        if k is not None:
            start, stop, _ = k.indices(self.in_features)
            period, words = codes_per_period(self.bits), words_per_period(self.bits)
            if self.g_idx is not None:
                raise ValueError("columns in act-order cannot be narrowed: a group lies all over K")
            if start % self.group_size or stop % self.group_size or start % period or stop % period:
                raise ValueError(f"columns {start}…{stop} split a group of {self.group_size} or a packed word")
            rows = slice(start // period * words, stop // period * words)
            groups = slice(start // self.group_size, stop // self.group_size)

        return self._replace(
            qweight=self.qweight[..., rows, columns],
            zeros=self.zeros[..., groups, columns],
            scales=self.scales[..., groups, columns],
            offsets=None if self.offsets is None else self.offsets[..., groups, columns],
        )


def completed(
    weight: GroupwiseWeight, change: "Tensor | None", a: "Tensor | None", b: "Tensor | None"
) -> GroupwiseWeight:
    """The weight with what is stored beside it, where there is such: a change of its scales ``[*E, G, N]``, and factors
    of offsets, ``[*E, G, r]`` and ``[*E, r, N]``."""
    if change is not None:
        weight = weight._replace(scales=weight.scales.float() + change)
    if a is None or b is None:
        return weight
    product = factored_offsets(a, b)
    return weight._replace(offsets=product if weight.offsets is None else weight.offsets + product)
