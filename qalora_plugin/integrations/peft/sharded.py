"""Models whose weights several processes share (FSDP2, DeepSpeed): made ready.

accelerate, torch and DeepSpeed do the sharding; they find parameters that they can take apart
(:mod:`qalora_plugin.layers.sharding`).
"""

import os
from collections import UserDict
from collections.abc import Iterator
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_config

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.unsupported import refuse_deepspeed
from qalora_plugin.integrations.peft.adapter import QALoraLayer
from qalora_plugin.integrations.peft.sharded_checkpoints import mend_checkpoints
from qalora_plugin.integrations.transformers.launched import is_launched_with
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.layers.sharding import make_factor_shardable


def make_shardable(model: PreTrainedModel) -> None:
    """Turn packed linears, one at a time, and the factors of their adapters into what can be sharded. Once is enough.

    Ranks that leave the weights to rank 0 hold a model on the meta device. What nobody will send them is made here:
    buffers that are in no file, and memory for the factors, by whose addresses accelerate knows the optimizer's.
    """
    if is_launched_with("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") == "1":
        refuse_fsdp1()
    if settings := deepspeed_config():
        refuse_deepspeed(settings, "the DeepSpeed config")
    # Of the dense parameters, and so of mixed precision.
    dtype = cast(nn.Embedding, model.get_input_embeddings()).weight.dtype
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.make_shardable(dtype)
        if isinstance(module, QALoraLayer):
            for factors in (module.lora_A, module.lora_B, module.lora_D, module.lora_C):
                for held in factors.values():
                    make_factor_shardable(held)
    _fill_buffers(model)
    _forget_what_was_sent()
    mend_checkpoints()


def refuse_fsdp1() -> None:
    raise QALoraError(
        "FSDP1 flattens what trains together with what does not. Use FSDP2: fsdp_config={'version': 2, …} of "
        "TrainingArguments, or accelerate launch --fsdp_version 2."
    )


class _Drained(UserDict):
    """A state dict that lets go of what it hands out."""

    def __init__(self, held: dict[str, Tensor]):
        self.data = held

    def items(self) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]  # no view
        for name in list(self.data):
            yield name, self.data.pop(name)


def _forget_what_was_sent() -> None:
    """accelerate 1.13 keeps the whole model on rank 0 until its last part is sent: half as much memory again.
    (``fsdp_utils.fsdp2_load_full_state_dict``; Axolotl has one of its own, which does not.)"""
    from accelerate.utils import fsdp_utils

    load = fsdp_utils.fsdp2_load_full_state_dict
    if not hasattr(load, "__wrapped__"):

        @wraps(load)
        def load_full_state_dict(accelerator: Any, model: Any, full_sd: dict[str, Tensor], **options: Any) -> Any:
            return load(accelerator, model, _Drained(full_sd), **options)

        fsdp_utils.fsdp2_load_full_state_dict = load_full_state_dict


def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute buffers that no checkpoint holds (rotary frequencies) where they are on the meta device."""
    owners: dict[nn.Module, PreTrainedModel] = {}
    for owner in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        owners |= dict.fromkeys(owner.modules(), owner)  # the innermost, which knows how
    for module, owner in owners.items():
        held = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
        missing = {name: buffer for name, buffer in held.items() if buffer is not None and buffer.is_meta}
        for name, buffer in missing.items():
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        if missing:
            with torch.no_grad():
                owner._init_weights(module)
