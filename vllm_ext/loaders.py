"""How tensors of a checkpoint get into a layer's parameters where vLLM's own weight loaders would not do it right.

Arguments are named as vLLM's loaders name them: its reloading looks them up by name.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from vllm.model_executor.parameter import BasevLLMParameter

from qalora_plugin.formats.gptq import Gptq


def load_g_idx(param: BasevLLMParameter, loaded_weight: Tensor, shard_id: str | int | tuple | None = None) -> None:
    """Load ``g_idx`` ``[S, K]``, one row a fused part (vLLM's loaders would keep the last)."""
    k = param.data.shape[1]
    start = param.tp_rank * k if loaded_weight.shape[0] > k else 0
    if shard_id is None:
        rows = range(len(param.data))
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

    def load_zeros(param: BasevLLMParameter, loaded_weight: Tensor, *args, **kwargs) -> None:
        load(param, fmt.true_zeros(loaded_weight, bits), *args, **kwargs)

    return load_zeros


def vocabulary_loader(layer: nn.Module) -> Callable[[BasevLLMParameter, Tensor], None]:
    """Weight loader for ``lm_head``, whose N is padded: this rank's tokens, then the last of them again and again.

    vLLM's own pads along dimension 0, which is K here. Logits of the padding are cut off; zero-points of its own would
    make a symmetric weight asymmetric.
    """
    first, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index

    def load(param: BasevLLMParameter, loaded_weight: Tensor) -> None:
        wanted = torch.arange(first, first + param.data.shape[1]).clamp(max=max(end, 1) - 1)
        param.data.copy_(loaded_weight[:, wanted])

    return load
