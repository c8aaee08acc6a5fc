"""What launchers tell their processes of how a model is shared out between them, by environment variables."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from transformers.integrations import deepspeed

_SHARE_OUT = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def is_one_of_several() -> bool:
    """Whether this process and others are a process group of torch's."""
    return dist.is_available() and dist.is_initialized()


def is_launched_with(name: str) -> bool:
    """Whether this is one of several processes, to whom their launcher says so much by an environment variable."""
    return is_one_of_several() and os.environ.get(name, "").lower() in ("1", "true")


def is_to_be_sharded() -> bool:
    """Whether this process trains with FSDP or DeepSpeed, which launchers say by environment variables.

    With every stage of ZeRO: DeepSpeed casts whole models, and would cast the scales too if they were to be seen.
    """
    return any(map(is_launched_with, _SHARE_OUT))


def is_sent_its_weights() -> bool:
    """Whether FSDP will send this process what rank 0 reads (``cpu_ram_efficient_loading``): it reads nothing.

    transformers leaves quantized models out of that (``PreTrainedModel.from_pretrained``, 5.16).
    """
    efficient = is_launched_with("ACCELERATE_USE_FSDP") and is_launched_with("FSDP_CPU_RAM_EFFICIENT_LOADING")
    return efficient and os.environ.get("LOCAL_RANK", "0") != "0"


@contextmanager
def alone() -> Iterator[None]:
    """What is loaded meanwhile is this process's own, and whole, though it trains with others: no launcher's word
    holds, nor the DeepSpeed config by which transformers divides a model as it loads it."""
    said = {name: os.environ.pop(name) for name in _SHARE_OUT if name in os.environ}
    settings, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        os.environ.update(said)
        deepspeed._hf_deepspeed_config_weak_ref = settings
