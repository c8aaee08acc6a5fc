"""QA-LoRA for GPTQ models: train in Axolotl or with the HF Trainer, merge exactly, serve in vLLM, always INT4.

Where this package is installed, transformers loads and saves merged checkpoints (``quant_method: qalora``), whether
anybody imports it or not: see :mod:`.registration`. Everything else is imported when it is first used: the vLLM
environment needs neither axolotl nor peft, and a merge not even transformers, which takes longer to import than a small
model takes to merge.
"""

from importlib import import_module
from typing import Any

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.registration import register_with_transformers

__version__ = "0.1.0"  # the one place: pyproject.toml reads it without importing anything
_LAZY = {
    "QALoraArgs": ".integrations.axolotl.args",
    "QALoraConfig": ".integrations.peft.adapter",
    "QALoraMergeCallback": ".integrations.trainer",
    "QALoraPlugin": ".integrations.axolotl.plugin",
    "add_adapter": ".integrations.peft.loading",
    "calibrate": ".methods.calibrating",
    "load_adapter": ".integrations.peft.loading",
    "load_base": ".integrations.transformers.loading",
    "merge": ".conversion.merging",
    "verify": ".eval.verifying",
}
__all__ = ["QALoraError", *_LAZY]
_OF_THE_TRAINING_ENVIRONMENT = ("axolotl", "peft")  # vLLM's has neither

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_LAZY[name], __name__)
    except ModuleNotFoundError as error:
        if error.name not in _OF_THE_TRAINING_ENVIRONMENT:
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs {error.name}, which is not installed here. Use it in the training environment, "
            f"or install {error.name}.",
            name=error.name,
        ) from error
    return getattr(module, name)
