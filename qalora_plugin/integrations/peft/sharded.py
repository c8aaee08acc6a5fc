"""Models whose weights several processes share (FSDP2, DeepSpeed): made ready, checked, and their adapters saved.

accelerate, torch and DeepSpeed do the sharding; they find parameters that they can take apart
(:mod:`qalora_plugin.layers.sharding`).
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraLayer
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.layers.sharding import ShardedFactor


def is_to_be_sharded() -> bool:
    """Whether this process trains with FSDP or DeepSpeed, which launchers say by environment variables.

    With every stage of ZeRO: DeepSpeed casts whole models, and would cast the scales too if they were to be seen.
    """
    asked = (os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true") for name in ("FSDP", "DEEPSPEED"))
    return dist.is_available() and dist.is_initialized() and any(asked)


def make_shardable(model: PreTrainedModel) -> None:
    """Turn packed linears, one at a time, and the factors of their adapters into what can be sharded. Once is enough.

    Ranks that leave the weights to rank 0 hold a model on the meta device. What nobody will send them is made here:
    buffers that are in no file, and memory for the factors, by whose addresses accelerate knows the optimizer's.
    """
    dtype = model.get_input_embeddings().weight.dtype  # of the dense parameters, and so of mixed precision
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.make_shardable(dtype)
        if isinstance(module, QALoraLayer):
            for factors in (module.lora_A, module.lora_B):
                for linear in factors.values():
                    linear.__class__ = ShardedFactor
                    if linear.weight.is_meta:
                        linear.to_empty(device="cpu")
    _fill_buffers(model)


def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute buffers that no checkpoint holds (rotary frequencies) where they are on the meta device."""
    owners = {}
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


def require_one_base(fingerprint: str) -> None:
    """Refuse to train where ranks have read different bases. Every rank calls it, and every rank is told.

    Raises:
        QALoraError: names the ranks that differ from the first.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, fingerprint)
    if others := [rank for rank, other in enumerate(found) if other != found[0]]:
        raise QALoraError(
            f"rank {others[0]} loaded another base than rank 0 ({found[others[0]]}, {found[0]}; "
            f"{len(others)} of {len(found)} ranks differ). Give every node the same checkpoint."
        )


def remove_checkpointing(model: nn.Module) -> None:
    """Take FSDP's activation checkpointing off a model that is trained: it is in the way of parameters' names.

    Axolotl 0.19 saves an adapter by these, with the wrappers' in them (``save_fsdp2_lora_adapter``).
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CheckpointWrapper):
                setattr(parent, name, child._checkpoint_wrapped_module)


def full_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a model's adapters, on the CPU, by their names in it. Every rank calls it."""
    named = [
        (name.replace("_checkpoint_wrapped_module.", ""), parameter)
        for name, parameter in model.named_parameters()
        if "lora_" in name
    ]
    if any(hasattr(parameter, "ds_id") for _, parameter in named):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([parameter for _, parameter in named]):
            return {name: parameter.detach().cpu().clone() for name, parameter in named}
    return {name: _whole(parameter.detach()).cpu() for name, parameter in named}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
