"""Models whose weights several processes share (FSDP2, DeepSpeed): made ready, checked, and their adapters saved.

accelerate, torch and DeepSpeed do the sharding; they find parameters that they can take apart
(:mod:`qalora_plugin.layers.sharding`).
"""

import os
from collections import UserDict
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.unsupported import refuse_deepspeed
from qalora_plugin.integrations.peft.adapter import QALoraLayer
from qalora_plugin.integrations.transformers.loading import is_launched_with
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.layers.sharding import make_factor_shardable

_OF_A_RANK = ("base_model_name_or_path", "qalora", "runtime_config")  # a path, what another check compares
_WRAPPED, _COMPILED = "_checkpoint_wrapped_module.", "_orig_mod."


def is_to_be_sharded() -> bool:
    """Whether this process trains with FSDP or DeepSpeed, which launchers say by environment variables.

    With every stage of ZeRO: DeepSpeed casts whole models, and would cast the scales too if they were to be seen.
    """
    return any(is_launched_with(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))


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


def require_one_base(fingerprint: str) -> None:
    """Refuse to train where ranks have read different bases. Every rank calls it, and every rank is told.

    Raises:
        QALoraError: names the ranks that differ from the first.
    """
    found = _of_all_ranks(fingerprint)
    if others := [rank for rank, other in enumerate(found) if other != found[0]]:
        raise QALoraError(
            f"rank {others[0]} loaded another base than rank 0 ({found[others[0]]}, {found[0]}; "
            f"{len(others)} of {len(found)} ranks differ). Give every node the same checkpoint."
        )


def require_one_adapter(config: PeftConfig, trained_before: str | None = None) -> None:
    """Refuse to train where ranks have different adapters, whose parts would not fit together, or would be mixed.
    Every rank calls it, before anything is shared out, and every rank is told.

    Args:
        trained_before: digest of the saved adapter that training goes on from.

    Raises:
        QALoraError: names the first rank that differs, and in what.
    """
    mine = {key: value for key, value in config.to_dict().items() if key not in _OF_A_RANK}
    found = _of_all_ranks(mine | {"the saved adapter": trained_before})
    for rank, other in enumerate(found):
        if key := next((key for key, value in found[0].items() if other.get(key) != value), None):
            raise QALoraError(
                f"rank {rank} trains another adapter than rank 0: {key} is {short(other.get(key))}, there "
                f"{short(found[0][key])}. Give every rank the same settings and saved adapter."
            )


def _of_all_ranks(mine: Any) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(found, mine)
    except RuntimeError as error:  # its connection is gone
        raise QALoraError(
            f"another rank ended while rank {dist.get_rank()} waited for it, as one does that cannot load its base or "
            f"its adapter. Its own message, in its own log, says why. (Here: {error})"
        ) from error
    return found


def remove_checkpointing(model: nn.Module) -> None:
    """Take FSDP's activation checkpointing off a model that is trained: it is in the way of parameters' names.

    Axolotl 0.19 saves an adapter by these, with the wrappers' in them (``save_fsdp2_lora_adapter``).
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CheckpointWrapper):
                setattr(parent, name, child._checkpoint_wrapped_module)


def unwrapped(name: str) -> str:
    """A module's name before FSDP checkpointed activations, or torch compiled it."""
    return name.replace(_WRAPPED, "").replace(_COMPILED, "")


def full_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a model's adapters, on the CPU, by their names in it. Every rank calls it."""
    named = [(name.replace(_WRAPPED, ""), parameter) for name, parameter in model.named_parameters() if "lora_" in name]
    if any(hasattr(parameter, "ds_id") for _, parameter in named):
        from deepspeed.zero import GatheredParameters  # type: ignore[import-not-found]  # only where it runs

        with GatheredParameters([parameter for _, parameter in named]):
            return {name: parameter.detach().cpu().clone() for name, parameter in named}
    return {name: _whole(parameter.detach()).cpu() for name, parameter in named}


def restore_adapter(model: PeftModel, checkpoint: Path) -> None:
    """Load the adapter of a FULL_STATE_DICT checkpoint into a model that FSDP2 has sharded. Every rank calls it.

    accelerate 1.13 does not: it saves rank 0's part of an adapter as if it were all, and loads that on rank 0 alone.
    (``fsdp_utils.save_fsdp_model`` with ``adapter_only``.) The whole adapter is beside it, as PEFT saves it.

    Raises:
        QALoraError: it is not there.
    """
    if not (checkpoint / "pytorch_model_fsdp.bin").exists():
        return
    file = checkpoint / "adapter_model.safetensors"
    if not file.is_file():
        raise QALoraError(f"{checkpoint} has no {file.name} to resume from. Resume an earlier checkpoint.")
    saved = load_file(file) if dist.get_rank() == 0 else {}
    parameter: Any  # a DTensor
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        stored = name.replace(_WRAPPED, "").replace(f".{model.active_adapter}.", ".")
        whole = saved.get(stored, torch.empty(parameter.shape)).to(parameter.dtype)
        parts: Any = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=0)
        parameter.detach().to_local().copy_(parts.to_local())


def resumed_from(args: TrainingArguments, state: TrainerState) -> Path | None:
    """The checkpoint that a run goes on from: the one that the arguments name, or the output folder's own."""
    if not state.global_step:
        return None
    named = args.resume_from_checkpoint
    return Path(named if isinstance(named, str) else f"{args.output_dir}/checkpoint-{state.global_step}")


class RestoreAdapter(TrainerCallback):
    """See :func:`restore_adapter`. ``folder``: of the checkpoint, where the Trainer's arguments do not name it."""

    def __init__(self, folder: str | None = None):
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        found = resumed_from(args, state)
        if found is not None:
            restore_adapter(kwargs["model"], Path(self.folder or found))


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
