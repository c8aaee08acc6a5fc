"""QA-LoRA for GPTQ models: train in Axolotl or with the HF Trainer, merge exactly, serve in vLLM, always INT4.

Importing this package makes transformers load and save merged checkpoints (``quant_method: qalora``). Everything else
is imported when it is first used: the vLLM environment needs neither axolotl nor peft, and a merge not even
transformers, which takes longer to import than a small model takes to merge.
"""

from importlib import import_module
from typing import Any

from .errors import QALoraError
from .registration import register_with_transformers

_LAZY = {
    "QALoraArgs": ".args",
    "QALoraConfig": ".adapter",
    "QALoraMergeCallback": ".trainer",
    "QALoraPlugin": ".plugin",
    "add_adapter": ".adapter",
    "load_adapter": ".adapter",
    "load_base": ".quant.loading",
    "merge": ".merging",
    "verify": ".verifying",
}
__all__ = ["QALoraError", *_LAZY]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name], __name__), name)
