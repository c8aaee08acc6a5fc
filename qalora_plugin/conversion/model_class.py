"""What transformers makes of a checkpoint's config: the config itself, and biases that the model has no place for."""

import logging
from typing import TYPE_CHECKING

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.opened import QuantizedCheckpoint

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


def read_config(source: QuantizedCheckpoint) -> "PretrainedConfig":
    """
    Raises:
        QALoraError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever configs of any kind raise
        raise QALoraError(f"{source.folder}: config.json cannot be read by transformers ({error}).") from error


def idle_biases(source: QuantizedCheckpoint) -> set[str]:
    """Names of biases of quantized linears that the model's class has not, to be left out: tools of 2023 stored zeros
    for every linear. transformers and vLLM pass over them, llama.cpp and mlx-lm load no file that holds one.

    Returns:
        none, too, if transformers does not know the class.

    Raises:
        Unsupported: one of them is not zero.
    """
    biased = [name for name, spec in source.specs.items() if spec.bias_dtype]
    model = _empty_model(source) if biased else None
    if model is None:
        return set()
    has = model.state_dict().keys()
    idle = {f"{name}.bias" for name in biased if f"{name}.weight" in has and f"{name}.bias" not in has}
    for bias in sorted(idle):
        if source.files.array(bias).any():
            raise Unsupported(
                f"{source.folder} holds {bias}, which is not zero, and a {type(model).__name__} has no bias there.",
                "Is config.json another model's? Download or copy the checkpoint again.",
            )
    return idle


def _empty_model(source: QuantizedCheckpoint) -> "nn.Module | None":
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(read_config(source))
    except Exception as error:  # a class of its own, or one that sees: whatever these raise
        logger.debug("%s: which biases the model has is not known: %s", source.folder, error)
        return None
