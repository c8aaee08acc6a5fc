"""The experts of a mixture-of-experts layer: their packed weights stacked, each applied to the tokens routed to it.

Drop-in for the modules that transformers 5 holds dense and stacked (``Qwen3MoeExperts``, ``GptOssExperts`` …), which
all compute ``down(combine(gate(x), up(x)))``. An expert that no token is routed to costs nothing. On CUDA one kernel
serves all experts; else, and where each has much to do, tokens are sorted by expert, and each runs as a linear does.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qalora_plugin.core.delta import OffsetDelta, ScaleDelta
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight, completed
from qalora_plugin.core.words import codes_per_period, words_per_period
from qalora_plugin.kernels import grouped
from qalora_plugin.kernels.autograd import linear
from qalora_plugin.layers.linear import QuantLinear

if TYPE_CHECKING:
    from qalora_plugin.kernels.triton.grouped import Tiles

_STACKED = ("qweight", "zeros", "scales", "offsets", "g_idx", "group_order")


class QuantExpertLinear(QuantLinear):
    """One projection of all experts: a :class:`QuantLinear` whose tensors have an axis of E experts in front.

    ``g_idx`` and ``group_order`` are ``[E, K]``: act-order is every expert's own. The buffers are not persistent, so
    that whoever loads a model by names leaves them alone; :meth:`put` fills them, an expert at a time.

    Args:
        specs: of every expert, in order; alike in sizes, bits and group size.
        act_order: whether any expert's columns are out of order.
    """

    def __init__(self, specs: Sequence[GroupwiseSpec], act_order: bool = False, device: str | None = None):
        spec = specs[0]
        super().__init__(spec)
        self.experts = experts = len(specs)
        k, n, groups = spec.in_features, spec.out_features, spec.groups
        period, words = codes_per_period(spec.bits), words_per_period(spec.bits)
        dense = [getattr(torch, one.offset_dtype) for one in specs if one.offset_dtype and not one.offset_rank]
        factored = [getattr(torch, one.offset_dtype) for one in specs if one.offset_dtype and one.offset_rank]
        changes = [getattr(torch, one.scales_delta_dtype) for one in specs if one.scales_delta_dtype]
        biases = [getattr(torch, one.bias_dtype) for one in specs if one.bias_dtype]
        rank = max(one.offset_rank for one in specs)
        shapes = {
            "qweight": ((k // period * words, n), torch.int32),
            "zeros": ((groups, n), torch.uint8),
            "scales": ((groups, n), _widest([getattr(torch, one.scale_dtype) for one in specs])),
            "offsets": ((groups, n), _widest(dense) if dense else None),
            "offsets_a": ((groups, rank), torch.float32 if factored else None),
            "offsets_b": ((rank, n), _widest(factored) if factored else None),
            "g_idx": ((k,), torch.int32 if act_order else None),
            "group_order": ((k,), torch.int64 if act_order else None),
            "scales_delta": ((groups, n), _widest(changes) if changes else None),
            "bias": ((n,), _widest(biases) if biases else None),
        }
        for name, (shape, dtype) in shapes.items():
            empty = None if dtype is None else torch.empty(experts, *shape, dtype=dtype, device=device)
            self.register_buffer(name, empty, persistent=False)

    def put(
        self,
        expert: int,
        weight: GroupwiseWeight,
        factors: tuple[Tensor, Tensor] | None = None,
        change: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Hold this weight as that expert's.

        Args:
            factors: of its offsets, ``[G, r]`` and ``[r, N]``, if they are stored so. (Those of a lower rank than
                another's are filled up with zeros.)
            change: of its scales, ``[G, N]``, where that is stored beside those of ``weight``. bias: ``[N]``.
        """
        if factors is not None:
            weight = weight._replace(offsets=None)
        if self.g_idx is not None and weight.g_idx is None:
            in_order = torch.arange(self.in_features)
            weight = weight._replace(g_idx=in_order // self.group_size, group_order=in_order)
        for name in _STACKED:
            buffer, tensor = getattr(self, name), getattr(weight, name)
            if buffer is not None and tensor is None:
                buffer[expert].zero_()  # offsets that this expert does not have
            elif buffer is not None:
                buffer[expert].copy_(tensor)
        if self.scales_delta is not None:
            self.scales_delta[expert].copy_(torch.zeros(()) if change is None else change)
        if self.offsets_a is not None and self.offsets_b is not None:
            self.offsets_a[expert].zero_()
            self.offsets_b[expert].zero_()
            if factors is not None:
                a, b = factors
                self.offsets_a[expert, :, : len(b)].copy_(a)
                self.offsets_b[expert, : len(b)].copy_(b)
        if self.bias is not None:
            self.bias[expert] = 0 if bias is None else bias

    def expert(self, i: int, tensors: list[Tensor | None] | None = None) -> GroupwiseWeight:
        """One expert's weight. tensors: from :meth:`tensors`, of a caller who asks for several experts."""
        *stacked, change, a, b, _ = tensors or self.tensors()
        weight = GroupwiseWeight.of(stacked, self.bits, self.group_size).expert(i)
        weight = completed(weight, *(None if tensor is None else tensor[i] for tensor in (change, a, b)))
        g_idx, group_order = stacked[-2:]
        if g_idx is None or group_order is None:
            return weight
        return weight._replace(g_idx=g_idx[i], group_order=group_order[i])

    def forward(  # type: ignore[override]  # rows come with what says whose they are
        self,
        x: Tensor,
        rows: "list[int] | Tiles",
        delta: OffsetDelta | None = None,
        scale_delta: ScaleDelta | None = None,
    ) -> Tensor:
        """``[S, K] → [S, N]``, each row by its expert.

        Args:
            x: sorted by expert, where ``rows`` counts those of every expert; else a row for each slot or each token.
            delta: adapters of all experts, A ``[E, R, G]`` (or one for all, ``[R, G]``) and B ``[E, N, R]``.
            scale_delta: likewise, D ``[E, G, R]`` and C ``[E, R, N]``.
        """
        if not isinstance(rows, list):
            weight, bias = self.held()
            y = grouped.linear(x, weight, rows, delta, scale_delta)
            return y if bias is None else y + bias[rows.owners()].to(y.dtype)
        nothing = [None] * self.experts
        deltas = nothing if delta is None else list(unstacked(delta))
        changes = nothing if scale_delta is None else list(unstacked_scales(scale_delta))
        tensors = self.tensors()
        parts = [linear(part, self.expert(i, tensors), deltas[i], changes[i]) for i, part in routed(x, rows)]
        y = torch.cat(parts) if parts else x.new_zeros(0, self.out_features)
        return plus_bias(y, rows, tensors[-1])

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new dense ``[E, K, N]`` weight, offsets included. For tests, reports and exports."""
        return torch.stack([self._plain(i).dense_weight(dtype) for i in range(self.experts)])

    def _plain(self, i: int) -> QuantLinear:
        spec = GroupwiseSpec("", self.in_features, self.out_features, self.bits, self.group_size)
        return QuantLinear(spec).set_weight(self.expert(i))

    def extra_repr(self) -> str:
        return f"experts={self.experts}, {super().extra_repr()}"


class QuantExperts(nn.Module):
    """``Σ_e weight_e·down_e(combine(gate_e(x), up_e(x)))`` over the experts e that each token is routed to.

    Attributes:
        gate_proj, up_proj, down_proj: a :class:`QuantExpertLinear` each, or an adapter around one.
        combine: what the family makes of gate and up, ``[S, inner]`` each → ``[S, inner]``; mostly ``act(gate)·up``.
    """

    def __init__(
        self,
        gate_proj: QuantExpertLinear,
        up_proj: QuantExpertLinear,
        down_proj: QuantExpertLinear,
        combine: Callable[[Tensor, Tensor], Tensor],
    ):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.combine, self.num_experts = combine, gate_proj.experts
        self._weights = gate_proj.in_features * gate_proj.out_features

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, hidden] → [T, hidden]``; index and weights of the experts chosen: ``[T, k]``."""
        tiles = None
        if not any(getattr(projection, "one_by_one", False) for projection in self.children()):
            tiles = grouped.tiles_for(hidden_states, top_k_index, self.num_experts, self._weights)
        if tiles is not None:
            y = self._mixed(hidden_states, tiles)
        else:
            chosen = top_k_index.flatten()
            order = chosen.argsort(stable=True)
            counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
            x = hidden_states.index_select(0, order // top_k_index.shape[-1])
            y = self._mixed(x, counts).index_select(0, order.argsort())
        y = y.unflatten(0, top_k_index.shape) * top_k_weights[..., None]
        return y.sum(1).to(hidden_states.dtype)

    def _mixed(self, x: Tensor, rows: "list[int] | Tiles") -> Tensor:
        return self.down_proj(self.combine(self.gate_proj(x, rows), self.up_proj(x, rows)), rows)


def routed(x: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has rows of x ``[S, K]``, and these."""
    for i, part in enumerate(x.split(counts)):
        if len(part):
            yield i, part


def plus_bias(y: Tensor, counts: list[int], bias: Tensor | None) -> Tensor:
    """Rows ``[S, N]``, sorted by expert, each plus its expert's bias, of ``[E, N]``."""
    if bias is None:
        return y
    return y + bias.to(y.dtype).repeat_interleave(torch.tensor(counts, device=y.device), 0, output_size=len(y))


def unstacked(delta: OffsetDelta) -> Iterator[OffsetDelta]:
    """Every expert's adapter. (``unbind``: its gradient is stacked once, not added up over slices.)"""
    lora_b = delta.lora_b.unbind()
    lora_a = delta.lora_a.unbind() if delta.lora_a.ndim == 3 else [delta.lora_a] * len(lora_b)
    for a, b in zip(lora_a, lora_b, strict=True):
        yield OffsetDelta(a, b, delta.scaling)


def unstacked_scales(delta: ScaleDelta) -> Iterator[ScaleDelta]:
    """Every expert's change of its scales."""
    for d, c in zip(delta.d.unbind(), delta.c.unbind(), strict=True):
        yield ScaleDelta(d, c, delta.every)


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest
