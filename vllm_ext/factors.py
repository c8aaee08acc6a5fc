"""Offsets that a checkpoint keeps as two factors, in a vLLM layer: ``offsets = a·b``, a ``[G, r]``, b ``[r, N]``.

Where vLLM has fused linears of the checkpoint (q, k, v), each has an a of its own, and its columns of b:

    y[:, part p] += P(x)·a_p·b[:, part p]

What a layer holds in the end is decided by size (``ops.prepare_factors``): the factors, all a side by side and b in
blocks, or their product ``[G, N]``; always the product where a kernel takes the offsets into its zero-points, where
zero-points are moved into them, and where another of the fused linears has offsets that are not factored.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter

from qalora_plugin.core.delta import factored_offsets
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from vllm_ext.compat import Layer
from vllm_ext.loaders import load_by_part, rows_of


class OffsetFactors:
    """The factors of those ``parts`` of a layer that have them.

    Attributes:
        rank: the largest of the parts'; others are filled up with zeros. dtype: of b.
    """

    def __init__(self, parts: Sequence[GroupwiseSpec]):
        self.rank = max(part.offset_rank for part in parts)
        dtypes = [getattr(torch, str(part.offset_dtype)) for part in parts if part.offset_rank]
        self.dtype = reduce(torch.promote_types, dtypes)

    @classmethod
    def of(cls, parts: Sequence[GroupwiseSpec]) -> "OffsetFactors | None":
        return cls(parts) if any(part.offset_rank for part in parts) else None

    def register(
        self,
        layer: Layer,
        parts: Sequence[GroupwiseSpec],
        groups: int,
        n: int,
        loader: Callable,
        noted: Callable[[str, Callable], Callable],
    ) -> None:
        """``offsets_a`` ``[S, G, r]``, a row of each fused part, and ``offsets_b`` ``[r, N]``: this rank's share.

        Args:
            loader: vLLM's, which takes a rank's and a part's columns. noted: what becomes of a tensor's loader.
        """
        rank = self.rank
        ranks = [part.offset_rank for part in parts]

        def load_a(param: BasevLLMParameter, loaded_weight: Tensor, shard_id: Any = None) -> None:
            require_rank(loaded_weight.shape[1], ranks, rows_of(shard_id, len(parts)))
            load_by_part(param, pad(loaded_weight, (0, rank - loaded_weight.shape[1])), shard_id)

        def load_b(param: BasevLLMParameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
            shard_id = next(iter((*args, *kwargs.values())), None)
            require_rank(loaded_weight.shape[0], ranks, rows_of(shard_id, len(parts)))
            loader(param, pad(loaded_weight, (0, 0, 0, rank - loaded_weight.shape[0])), *args, **kwargs)

        a, b = torch.empty(len(parts), groups, rank), torch.empty(rank, n, dtype=self.dtype)
        load_b = noted("offsets_b", load_b)
        layer.register_parameter("offsets_a", BasevLLMParameter(data=a, weight_loader=noted("offsets_a", load_a)))
        layer.register_parameter("offsets_b", ChannelQuantScaleParameter(data=b, output_dim=1, weight_loader=load_b))


def require_rank(found: int, ranks: Sequence[int], rows: Iterable[int]) -> None:
    """Refuse reloaded factors that are wider than those that a layer was made for.

    Args:
        ranks: of the layer's parts; one for all rows, or one each. rows: what is loaded.
    """
    rank = min(ranks[row] if len(ranks) > 1 else ranks[0] for row in rows)
    if found > rank:
        raise QALoraError(
            f"the reloaded offsets have factors of rank {found}, and the server was started with rank {rank} at most. "
            "Start the server anew."
        )


def take(layer: Layer, parts: Sequence[GroupwiseSpec], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The loaded factors of a layer as one pair, a ``[G, Σr]`` and b ``[Σr, N]`` in blocks.

    Args:
        sizes: columns of each part.
    """
    a, b = layer.offsets_a.data, layer.offsets_b.data.split(list(sizes), dim=1)
    layer.register_parameter("offsets_a", None)
    layer.register_parameter("offsets_b", None)
    ranks = [part.offset_rank for part in parts]
    narrow = [one[:, :rank] for one, rank in zip(a, ranks, strict=True)]
    blocks = [one[:rank] for one, rank in zip(b, ranks, strict=True)]
    return torch.cat(narrow, dim=1), torch.block_diag(*blocks)


def multiplied(factors: tuple[Tensor, Tensor], beside: Tensor | None = None) -> Tensor:
    """``a·b`` ``[G, N]``, float32; with the offsets of parts that are not factored, zero for those that are."""
    product = factored_offsets(*factors)
    return product if beside is None else product + beside
