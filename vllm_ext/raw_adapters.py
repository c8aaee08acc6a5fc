"""vLLM up to 0.31 would serve an unmerged QA-LoRA adapter as an ordinary LoRA, silently wrong: here it is refused.

Such a folder looks like a LoRA whose A is ``[R, K/g]``. vLLM reads no ``peft_type``; only since 0.32 it reads, and
refuses, ``use_qalora``, which our adapters carry for that purpose.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from qalora_plugin.core.errors import QALoraError

PEFT_TYPE = "QALORA"  # qalora_plugin.checkpoint.adapter_folder, which vLLM's processes need not import


def refuse_raw_adapters() -> None:
    """Have vLLM's reader of adapter configs refuse pooled adapters. Again is harmless."""
    from vllm.lora.peft_helper import PEFTHelper

    read = PEFTHelper.from_dict
    if not getattr(read, "refuses_raw_adapters", False):
        PEFTHelper.from_dict = classmethod(_checked(read.__func__))


def _checked(read: Callable) -> Callable:
    @wraps(read)
    def from_dict(cls: type, config: dict[str, Any]) -> Any:
        if config.get("peft_type") == PEFT_TYPE or config.get("use_qalora"):
            raise QALoraError(
                "this is an unmerged QA-LoRA adapter, whose A is pooled; as a LoRA it would be served wrongly. Merge "
                "it (qalora merge), or make an ordinary LoRA of it: qalora export lora ADAPTER OUT."
            )
        return read(cls, config)

    from_dict.refuses_raw_adapters = True  # type: ignore[attr-defined]  # a mark on a function
    return from_dict
