"""How tensors of a checkpoint get into a layer's parameters where vLLM's own weight loaders would not do it right.

Arguments are named as vLLM's loaders name them: its reloading looks them up by name.
"""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.packing import pack_rows, unpack_rows
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.gptq import Gptq
from vllm_ext.compat import Layer

SHARDS = ("q", "k", "v", "index_q", "index_k")  # what vLLM calls the parts of an attention's linear, in order


def rows_of(shard_id: str | int | tuple | None, rows: int) -> Iterable[int]:
    """Which of a layer's ``rows`` outputs one call of a weight loader is for."""
    if shard_id is None:
        return range(rows)
    if isinstance(shard_id, str):
        return [SHARDS.index(shard_id)]
    return shard_id if isinstance(shard_id, tuple) else [shard_id]


def by_output(
    parts: Sequence[GroupwiseSpec], outputs: Sequence[int], ranks: Fraction, prefix: str
) -> list[GroupwiseSpec]:
    """The checkpoint's linear of each output, where vLLM takes one of them apart (Qwen3.5's ``in_proj_qkv``).

    Args:
        outputs: columns of this rank. ranks: that share them.

    Raises:
        QALoraError: the sizes do not add up.
    """
    rest, found = list(outputs), []
    for part in parts:
        width = 0
        while rest and width < part.out_features:
            width += int(rest.pop(0) * ranks)
            found.append(part)
        if width != part.out_features:
            break
    if rest or width != part.out_features:
        listed = ", ".join(f"{part.name}: {part.out_features}" for part in parts)
        raise QALoraError(
            f"{prefix}: vLLM builds it with outputs of {list(outputs)} columns a rank, which are not the checkpoint's "
            f"({listed}). Serve it with transformers."
        )
    return found


def parameter_of(name: str, data: Tensor, load: Callable, bits: int, one_group: bool) -> BasevLLMParameter:
    """A tensor of the checkpoint as vLLM's kernels and loaders know it, by its dimensions.

    Args:
        name: its last part. one_group: there is one over all of K.
    """
    if name in ("g_idx", "offsets_a", "offsets_b"):
        return BasevLLMParameter(data=data, weight_loader=load)
    if name == "qweight":
        return PackedvLLMParameter(
            data=data, input_dim=0, output_dim=1, packed_dim=0, packed_factor=Fraction(32, bits), weight_loader=load
        )
    if one_group:
        return ChannelQuantScaleParameter(data=data, output_dim=1, weight_loader=load)
    return GroupQuantScaleParameter(data=data, input_dim=0, output_dim=1, weight_loader=load)


def load_by_part(param: BasevLLMParameter, loaded_weight: Tensor, shard_id: str | int | tuple | None = None) -> None:
    """Load one row a fused part (vLLM's loaders would keep the last): of ``g_idx`` ``[S, K]``, or of what else runs
    along the input, ``[S, G, …]``, this rank's share."""
    k = param.data.shape[1]
    start = param.tp_rank * k if loaded_weight.shape[0] > k else 0
    for row in rows_of(shard_id, len(param.data)):
        param.data[row].copy_(loaded_weight[start : start + k])  # vLLM's reloading counts what copy_ moves


def zeros_loader(load: Callable, bits: int, fmt: Gptq) -> Callable:
    """``load`` for ``qzeros``, unpacked first: true zero-points, uint8 ``[G, N]``.

    Packed, eight 4-bit columns to a word, a tensor-parallel rank could not take part of a word.
    """

    def load_zeros(param: BasevLLMParameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
        load(param, fmt.true_zeros(loaded_weight, bits), *args, **kwargs)

    return load_zeros


_NEEDED = ("qweight", "qzeros", "scales")
_CHANGES = ("offsets", "offsets_a", "offsets_b", "scales_delta")


def _stored(part: GroupwiseSpec) -> dict[str, bool]:
    """Whether the checkpoint has each of a linear's tensors, by its headers."""
    factored = part.offset_rank > 0
    return dict.fromkeys(_NEEDED, True) | {
        "offsets": part.offset_dtype is not None and not factored,
        "offsets_a": factored,
        "offsets_b": factored,
        "scales_delta": part.scales_delta_dtype is not None,
        "g_idx": part.has_g_idx,
    }


class Loads:
    """What has been loaded into a layer since its weights were last processed.

    ``reload_weights`` may bring other tensors than those the layer was made for, and vLLM then leaves what is missing
    uninitialised.

    Args:
        prefix: name of the layer in the vLLM model, for messages.
        guessed: ``parts`` are those of a layer that is called alike, so that optional tensors may be missing.

    Attributes:
        expected: something has to be loaded at first, or what is served is what memory happened to hold.
    """

    def __init__(self, prefix: str, guessed: bool = False):
        self.prefix, self.guessed, self.expected = prefix, guessed, False
        self.found: set[tuple[str, int]] = set()

    def noted(self, name: str, load: Callable, outputs: int) -> Callable:
        """``load`` for the tensor ``name`` of a layer with so many fused outputs, which is remembered."""

        @wraps(load)  # its arguments' names, too
        def load_and_note(param: BasevLLMParameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
            shard_id = next(iter((*args, *kwargs.values())), None)
            load(param, loaded_weight, *args, **kwargs)
            self.note(name, rows_of(shard_id, outputs))

        return load_and_note

    def note(self, name: str, rows: Iterable[int]) -> None:
        self.found |= {(name, row) for row in rows}

    def complete(
        self, layer: Layer, parts: Sequence[GroupwiseSpec], columns: Sequence[int], in_order: Tensor, first: bool
    ) -> None:
        """Fill what parts do not store: some of a fused layer may have no adapter (q and v only), or no ``g_idx``.

        Args:
            parts: of the checkpoint, one an output, or one for all. columns: of each part. in_order: ``g_idx`` ``[K]``
                without act-order. first: these are the weights that the server starts with.

        Raises:
            QALoraError: nothing was loaded at first; or something, but not just what the checkpoint stored.
        """
        found, self.found = self.found, set()
        if first and self.expected and not found:
            raise QALoraError(
                f"no tensor was loaded for {self.prefix}: the checkpoint's files hold none of that layer, which "
                "config.json has. Download or copy it again."
            )
        if len(parts) == 1:
            found = {(name, 0) for name, _ in found}
        ends = list(accumulate(columns))
        for row, (part, start, end) in enumerate(zip(parts, [0, *ends[:-1]], ends, strict=True)):
            for name, there in _stored(part).items():
                missing = (name, row) not in found
                optional = self.guessed and name not in _NEEDED
                if there and missing and found and not optional:
                    raise self._lacks(part, row, name, first)
                if not there and not missing and not self.guessed and name in _CHANGES:
                    raise QALoraError(
                        f"the weights that were loaded hold {name} of {part.name} (served as {self.prefix}), which the "
                        "server was started without. Start it anew with the other checkpoint."
                    )
                if not missing or (there and not optional) or getattr(layer, name, None) is None:
                    continue
                rows = row if len(parts) > 1 else slice(None)
                if name == "g_idx":
                    layer.g_idx.data[rows] = in_order.to(layer.g_idx.device)
                elif name == "offsets_a":
                    layer.offsets_a.data[rows] = 0
                else:
                    getattr(layer, name).data[:, start:end] = 0

    def _lacks(self, part: GroupwiseSpec, row: int, name: str, first: bool) -> QALoraError:
        if first and name in _NEEDED:
            return QALoraError(
                f"the checkpoint lacks the {name} of part {row + 1} of {self.prefix}, which vLLM runs as one with "
                f"{part.name}. Download or copy it again; if it is whole, serve it with transformers."
            )
        return QALoraError(
            f"the weights that were loaded lack {part.name}.{name} (served as {self.prefix}), which the server was "
            "started with. Start it anew with the other checkpoint."
        )


def require_finite(layer: Layer, parts: Sequence[GroupwiseSpec], columns: Sequence[int], prefix: str) -> None:
    """Refuse NaN and Inf, which would make every answer of the server worthless; the tensor is named."""
    for name in ("scales", "offsets", "offsets_a", "offsets_b", "scales_delta"):
        if (stored := getattr(layer, name, None)) is None or stored.data.isfinite().all():
            continue
        if name == "offsets_a":
            row = int((~stored.data.isfinite()).flatten(1).any(1).nonzero()[0])
        else:
            column = int((~stored.data.isfinite()).any(0).nonzero()[0])
            row = int((torch.tensor(columns).cumsum(0) <= column).sum())
        raise QALoraError(
            f"{parts[row].name}.{name} holds NaN or Inf (served as {prefix}). The quantisation failed or the training "
            "diverged: make the base, or the merge, again."
        )


def vocabulary_loader(layer: Layer) -> Callable[[BasevLLMParameter, Tensor], None]:
    """Weight loader for ``lm_head``, whose N is padded: this rank's tokens, then the last of them again and again.

    vLLM's own pads along dimension 0, which is K here. Logits of the padding are cut off; zero-points of its own would
    make a symmetric weight asymmetric.
    """
    first, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index

    def load(param: BasevLLMParameter, loaded_weight: Tensor) -> None:
        wanted = torch.arange(first, first + param.data.shape[1]).clamp(max=max(end, 1) - 1)
        param.data.copy_(loaded_weight[:, wanted])

    return load


def sort_rows(qweight: Tensor, bits: int, order: Tensor, sizes: list[int]) -> Tensor:
    """Reorder the K codes of every column; with several orders, each for its own part of the columns."""
    codes = unpack_rows(qweight, bits)
    if len(order) == 1:
        return pack_rows(codes[order[0]], bits)
    parts = [part[rows] for part, rows in zip(codes.split(sizes, dim=1), order, strict=True)]
    return pack_rows(torch.cat(parts, dim=1), bits)
