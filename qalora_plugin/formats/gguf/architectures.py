"""Which models can cross between a folder and a GGUF file: their tensors' names, and what llama.cpp stores differently.

Names are those of the ``gguf`` package. Two things are not a matter of names: llama.cpp rotates neighbouring channels
where transformers rotates halves, so for Llama it stores the rows of q and k in another order; and it stores Gemma's
norms with the 1 added that transformers adds in the forward pass. (llama.cpp ``convert_hf_to_gguf.py``, ``permute`` and
``norm_shift``; undone in transformers' ``modeling_gguf_pytorch_utils.py``.)
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.gguf import require_gguf


@dataclass(frozen=True)
class Architecture:
    """Attributes:
    name: ``general.architecture``. model_types: of transformers, the first being what a GGUF file becomes.
    permutes: whether rows of q and k are stored in another order. norm_shift: what is added to norms' weights.
    """

    name: str
    model_types: tuple[str, ...]
    permutes: bool = False
    norm_shift: int = 0


ARCHITECTURES = (
    Architecture("llama", ("llama", "mistral"), permutes=True),
    Architecture("qwen2", ("qwen2",)),
    Architecture("qwen3", ("qwen3",)),
    Architecture("gemma2", ("gemma2",), norm_shift=1),
    Architecture("gemma3", ("gemma3_text",), norm_shift=1),
    Architecture("phi3", ("phi3",)),
)
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def of_file(name: str, where: object) -> Architecture:
    """The architecture of a GGUF file."""
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise QALoraError(
        f"{where} is a model of architecture {short(name)}, expected one of {known}. Quantize its original 16-bit "
        "checkpoint instead: qalora quantize MODEL OUT."
    )


def of_config(config: Mapping[str, Any], where: object) -> Architecture:
    """The architecture of a model folder, by its ``config.json``."""
    model_type = config.get("model_type")
    for architecture in ARCHITECTURES:
        if model_type in architecture.model_types:
            return architecture
    known = ", ".join(model_type for architecture in ARCHITECTURES for model_type in architecture.model_types)
    raise QALoraError(
        f"{where} is a {short(model_type)} model, which cannot be written as GGUF yet, expected one of {known}. Serve "
        "it with vLLM or transformers."
    )


def tensor_names(architecture: Architecture, layers: int, tensors: Iterable[str]) -> dict[str, str]:
    """Names in a model folder (``….weight``, ``….bias``) → names in GGUF; what has none there is left out."""
    gguf = require_gguf()
    known = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    table = gguf.get_tensor_name_map(known, layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in tensors}
    return {name: stored for name, stored in found.items() if stored is not None}


def row_order(architecture: Architecture, config: Mapping[str, Any], tensor: str, rows: int) -> np.ndarray | None:
    """Which row of the model's tensor each row in GGUF is, int ``[rows]``; None where they are in order.

    Args:
        tensor: name in the model folder, of a weight, a bias, or a quantized linear.
    """
    heads_key = next((key for leaf, key in _HEADS.items() if leaf in tensor.split(".")), None)
    if not architecture.permutes or heads_key is None:
        return None
    heads = config.get(heads_key) or config["num_attention_heads"]
    if rows % (2 * heads):
        raise QALoraError(
            f"{tensor} has {rows} rows, which {heads} heads cannot share. Is config.json another model's?"
        )
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def norm_shift(architecture: Architecture, tensor: str) -> int:
    """What GGUF adds to this tensor."""
    return architecture.norm_shift if tensor.endswith("norm.weight") else 0
