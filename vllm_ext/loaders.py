"""How tensors of a checkpoint get into a layer's parameters where vLLM's own weight loaders would not do it right.

Arguments are named as vLLM's loaders name them: its reloading looks them up by name.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.gptq import Gptq
from vllm_ext.compat import Layer


def load_by_part(param: BasevLLMParameter, loaded_weight: Tensor, shard_id: str | int | tuple | None = None) -> None:
    """Load one row a fused part (vLLM's loaders would keep the last): of ``g_idx`` ``[S, K]``, or of what else runs
    along the input, ``[S, G, …]``, this rank's share."""
    k = param.data.shape[1]
    start = param.tp_rank * k if loaded_weight.shape[0] > k else 0
    if shard_id is None:
        rows: Iterable[int] = range(len(param.data))
    elif isinstance(shard_id, str):
        rows = ["qkv".index(shard_id)]
    else:
        rows = shard_id if isinstance(shard_id, tuple) else [shard_id]
    for row in rows:
        param.data[row].copy_(loaded_weight[start : start + k])  # vLLM's reloading counts what copy_ moves


def zeros_loader(load: Callable, bits: int, fmt: Gptq) -> Callable:
    """``load`` for ``qzeros``, unpacked first: true zero-points, uint8 ``[G, N]``.

    Packed, eight 4-bit columns to a word, a tensor-parallel rank could not take part of a word.
    """

    def load_zeros(param: BasevLLMParameter, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
        load(param, fmt.true_zeros(loaded_weight, bits), *args, **kwargs)

    return load_zeros


def fill_what_is_not_stored(
    layer: Layer, parts: Sequence[GroupwiseSpec], columns: Sequence[int], in_order: Tensor
) -> None:
    """Some parts of a fused layer may have no adapter (q and v only), or no ``g_idx``: zeros, and groups in order.

    Not where parameters are created: for ``reload_weights`` vLLM creates them anew, uninitialised.

    Args:
        columns: of each part. in_order: ``g_idx`` ``[K]`` without act-order.
    """
    ends = list(accumulate(columns))
    for row, (part, start, end) in enumerate(zip(parts, [0, *ends[:-1]], ends, strict=True)):
        stored = {
            "offsets": part.offset_dtype is not None and not part.offset_rank,
            "offsets_b": part.offset_rank > 0,
            "scales_delta": part.scales_delta_dtype is not None,
        }
        for name, there in stored.items():
            if not there and getattr(layer, name, None) is not None:
                getattr(layer, name).data[:, start:end] = 0
        if not part.offset_rank and getattr(layer, "offsets_a", None) is not None:
            layer.offsets_a.data[row] = 0
        if not part.has_g_idx and getattr(layer, "g_idx", None) is not None:
            layer.g_idx.data[row] = in_order.to(layer.g_idx.device)


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
