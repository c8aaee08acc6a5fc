"""QA-LoRA for GPTQ models: train in Axolotl or with the HF Trainer, merge exactly, serve in vLLM, always INT4.

Importing this package makes transformers load and save merged checkpoints (``quant_method: qalora``). Everything else
is imported when it is first used, so that the vLLM environment needs neither axolotl nor peft.
"""

from importlib import import_module
from typing import Any

from .errors import QALoraError
from .quant.loading import load_base, register

_LAZY = {
    "QALoraArgs": ".args",
    "QALoraConfig": ".adapter",
    "QALoraMergeCallback": ".trainer",
    "QALoraPlugin": ".plugin",
    "add_adapter": ".adapter",
    "load_adapter": ".adapter",
    "merge": ".merging",
    "verify": ".verifying",
}
__all__ = ["QALoraError", "load_base", *_LAZY]

register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
