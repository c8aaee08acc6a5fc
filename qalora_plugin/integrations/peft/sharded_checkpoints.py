"""Adapters of models whose weights several processes share: saved whole, and restored whole on every rank."""

import sys
from collections.abc import Callable
from copy import copy
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from qalora_plugin.checkpoint.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraConfig
from qalora_plugin.integrations.peft.ranks import check_on_rank_0
from qalora_plugin.integrations.peft.resuming import require_same_run, unwrapped

_FULL_STATE = "pytorch_model_fsdp.bin"
# Where the functions below are, and where they were imported by name.
_HOLDERS = (
    "accelerate.utils.fsdp_utils",
    "accelerate.utils",
    "accelerate.accelerator",
    "transformers.integrations.deepspeed",
    "transformers.trainer",
)


def mend_checkpoints() -> None:
    """Have checkpoints of FSDP and DeepSpeed checked when they are loaded, and hold what that takes. Once is enough."""
    for name, mended in (
        ("save_fsdp_model", _with_config),
        ("load_fsdp_model", _whole_and_checked),
        ("deepspeed_load_checkpoint", _checked),
    ):
        for holder in map(sys.modules.get, _HOLDERS):
            function = vars(holder).get(name) if holder else None
            if function is not None and not hasattr(function, "__wrapped__"):
                setattr(holder, name, mended(function))


def _with_config(save: Callable) -> Callable:
    """A SHARDED_STATE_DICT checkpoint says nothing of its adapter; its config goes beside it."""

    @wraps(save)
    def save_fsdp_model(plugin: Any, accelerator: Any, model: Any, output_dir: str, *args: Any, **kwargs: Any) -> Any:
        result = save(plugin, accelerator, model, output_dir, *args, **kwargs)
        config = _config_of(model)
        if config and accelerator.process_index == 0 and not Path(output_dir, CONFIG_NAME).exists():
            config = copy(config)
            config.inference_mode = True  # as PEFT saves it
            config.save_pretrained(output_dir)
        return result

    return save_fsdp_model


def _whole_and_checked(load: Callable) -> Callable:
    """accelerate 1.13 saves rank 0's part of an adapter as if it were all, and loads that on rank 0 alone: with
    FULL_STATE_DICT (``fsdp_utils.save_fsdp_model`` with ``adapter_only``)."""

    @wraps(load)
    def load_fsdp_model(plugin: Any, accelerator: Any, model: Any, input_dir: str, *args: Any, **kwargs: Any) -> Any:
        if _config_of(model) is None:
            return load(plugin, accelerator, model, input_dir, *args, **kwargs)
        check_on_rank_0(lambda: _check(model, Path(input_dir)))
        result = load(plugin, accelerator, model, input_dir, *args, **kwargs)
        if "FULL_STATE_DICT" in str(plugin.state_dict_type):
            restore_adapter(model, Path(input_dir))
        return result

    return load_fsdp_model


def _checked(load: Callable) -> Callable:
    """DeepSpeed leaves what a checkpoint lacks as it is."""

    @wraps(load)
    def deepspeed_load_checkpoint(engine: Any, checkpoint_path: str, *args: Any, **kwargs: Any) -> Any:
        if _config_of(engine.module) is not None:
            check_on_rank_0(lambda: _check(engine.module, Path(checkpoint_path)))
        return load(engine, checkpoint_path, *args, **kwargs)

    return deepspeed_load_checkpoint


def _config_of(model: Any) -> QALoraConfig | None:
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    return config if isinstance(config, QALoraConfig) else None


def _check(model: PeftModel, checkpoint: Path) -> None:
    if (checkpoint / _FULL_STATE).exists() and not (checkpoint / WEIGHTS_NAME).is_file():
        raise QALoraError(f"{checkpoint} has no {WEIGHTS_NAME} to load the adapter from. Resume an earlier checkpoint.")
    require_same_run(model, checkpoint, weights=(checkpoint / _FULL_STATE).exists())


def restore_adapter(model: PeftModel, checkpoint: Path) -> None:
    """Load the adapter of a FULL_STATE_DICT checkpoint into a model that FSDP2 has sharded, from the whole one that
    PEFT has saved beside it. Every rank calls it; rank 0 reads."""
    saved = load_file(checkpoint / WEIGHTS_NAME) if dist.get_rank() == 0 else {}
    parameter: Any  # a DTensor
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        stored = unwrapped(name).replace(f".{model.active_adapter}.", ".")
        whole = saved.get(stored, torch.empty(parameter.shape)).to(parameter.dtype)
        parts: Any = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=0)
        parameter.detach().to_local().copy_(parts.to_local())


def full_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a model's adapters, on the CPU, by their names in it. Every rank calls it."""
    named = [(unwrapped(name), parameter) for name, parameter in model.named_parameters() if "lora_" in name]
    if any(hasattr(parameter, "ds_id") for _, parameter in named):
        from deepspeed.zero import GatheredParameters  # type: ignore[import-not-found]  # only where it runs

        with GatheredParameters([parameter for _, parameter in named]):
            return {name: parameter.detach().cpu().clone() for name, parameter in named}
    return {name: _whole(parameter.detach()).cpu() for name, parameter in named}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def remove_checkpointing(model: nn.Module) -> None:
    """Take FSDP's activation checkpointing off a model that is trained: it is in the way of parameters' names.

    Axolotl 0.19 saves an adapter by these, with the wrappers' in them (``save_fsdp2_lora_adapter``).
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CheckpointWrapper):
                setattr(parent, name, child._checkpoint_wrapped_module)
