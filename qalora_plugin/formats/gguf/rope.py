"""Rotary positions: ``rope_parameters`` of transformers ↔ metadata and tensors of GGUF.

llama.cpp has no settings for Llama 3's scaling and for Phi-3's ``longrope``: a factor for every frequency lies in the
file as a tensor (``rope_freqs``, ``rope_factors_long``, ``rope_factors_short``), which transformers' own reader of GGUF
ignores. Sources: llama.cpp ``convert_hf_to_gguf.py`` (``generate_extra_tensors``), transformers
``modeling_rope_utils.py``.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf.reading import GgufFile

LLAMA3_FACTORS, LONG_FACTORS, SHORT_FACTORS = TENSORS = (
    "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight",
)  # fmt: skip
_DEFAULT_BASE = 10000.0  # llama.cpp's, where the file names none
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN_DEFAULTS = {
    "truncate": True,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
_YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
_YARN_OF_LLAMA_CPP = {  # what transformers has no setting for, or one that means something else
    "attn_factor": (1.0,), "yarn_attn_factor": (1.0,), "yarn_ext_factor": (-1.0, 1.0), "yarn_log_multiplier": (0.0,),
}  # fmt: skip
_CLOSE = 1e-4  # relative; the factors are float32
_ANOTHER_CONFIG = "Pass the original model's config: model_config=FOLDER."


def parameters_of(file: GgufFile, rotary: int) -> dict[str, Any]:
    """``rope_parameters`` for ``config.json``.

    Args:
        rotary: channels of a head that are rotated.

    Raises:
        QALoraError: a scaling that cannot be told from the file.
    """
    base = file.real("rope.freq_base", _DEFAULT_BASE)
    kind = file.value(f"{file.architecture}.rope.scaling.type", str, "none")
    factor = file.real("rope.scaling.factor", file.real("rope.scale_linear", 1.0))
    context = file.number("rope.scaling.original_context_length", None)
    if LONG_FACTORS in file.tensors:
        long, short = (_factors(file, name, rotary) for name in (LONG_FACTORS, SHORT_FACTORS))
        whole = file.number("context_length")
        usual = _longrope_attention(whole, context or whole)
        attention = file.real("rope.scaling.attn_factor", usual)
        more = {} if math.isclose(attention, usual, rel_tol=_CLOSE) else {"attention_factor": attention}
        return {"rope_type": "longrope", "rope_theta": base, "long_factor": long, "short_factor": short, **more}
    if LLAMA3_FACTORS in file.tensors:
        return _llama3_of(file, base, rotary)
    if kind == "none" or (kind == "linear" and factor == 1):
        return {"rope_type": "default", "rope_theta": base}
    if kind == "linear" and factor > 0:
        return {"rope_type": "linear", "rope_theta": base, "factor": factor}
    if kind == "yarn" and context and factor >= 1:
        _require_usual_yarn(file)
        betas = {key: file.real(f"rope.scaling.yarn_{key}", usual) for key, usual in _YARN_BETAS.items()}
        scaling = {"factor": factor, "original_max_position_embeddings": context}
        scaling |= {key: beta for key, beta in betas.items() if beta != _YARN_BETAS[key]}
        return {"rope_type": "yarn", "rope_theta": base, **scaling}
    raise QALoraError(f"{file.path} scales its positions by {kind!r}, factor {factor}. {_ANOTHER_CONFIG}")


def _longrope_attention(context: int, original: int) -> float:
    """What transformers multiplies queries and keys by where the config does not say it."""
    stretch = context / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _require_usual_yarn(file: GgufFile) -> None:
    for key, usual in _YARN_OF_LLAMA_CPP.items():
        if (found := file.real(f"rope.scaling.{key}", usual[0])) not in usual:
            raise QALoraError(f"{file.path} scales its positions by 'yarn' with {key} {found}. {_ANOTHER_CONFIG}")


def llama3_factors(parameters: Mapping[str, Any], rotary: int) -> np.ndarray:
    """What every frequency is divided by, float32 ``[rotary/2]``."""
    frequencies = parameters["rope_theta"] ** -(np.arange(0, rotary, 2) / rotary)
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the first context
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clip(0, 1)
    return (1 / ((1 - kept) / parameters["factor"] + kept)).astype(np.float32)


def metadata_of(
    parameters: Mapping[str, Any], architecture: str, rotary: int, context: int, original_context: int | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata (``rope.…`` → value) and tensors for the ``rope_parameters`` of one kind of layer.

    Args:
        context: ``max_position_embeddings``. original_context: ``original_max_position_embeddings`` of the config.

    Raises:
        Unsupported: llama.cpp has no such scaling.
    """
    kind = parameters.get("rope_type", "default")
    base = {"rope.freq_base": float(parameters["rope_theta"])}
    if kind == "default":
        return base, {}
    if kind == "linear":
        return {**base, "rope.scaling.type": "linear", "rope.scaling.factor": float(parameters["factor"])}, {}
    if kind == "yarn" and all(parameters.get(key) in (None, value) for key, value in _YARN_DEFAULTS.items()):
        scaling = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(parameters["factor"]),
            "rope.scaling.original_context_length": int(parameters["original_max_position_embeddings"]),
        }
        return base | scaling, {}
    if kind == "llama3" and architecture == "llama":
        return base, {LLAMA3_FACTORS: llama3_factors(parameters, rotary)}
    if kind == "longrope" and architecture == "phi3":
        original = parameters.get("original_max_position_embeddings") or original_context or context
        attention = parameters.get("attention_factor") or _longrope_attention(context, original)
        scaling = {
            "rope.scaling.original_context_length": int(original),
            "rope.scaling.attn_factor": float(attention),
        }
        tensors = {LONG_FACTORS: parameters["long_factor"], SHORT_FACTORS: parameters["short_factor"]}
        return base | scaling, {name: np.array(factors, np.float32) for name, factors in tensors.items()}
    raise Unsupported(
        f"the model scales its positions by {kind!r} ({dict(parameters)}), which cannot be written for llama.cpp's "
        f"{architecture}.",
        "Pass a GGUF of the same model to copy metadata from: --like BASE.gguf.",
    )


def _llama3_of(file: GgufFile, base: float, rotary: int) -> dict[str, Any]:
    stored = np.array(_factors(file, LLAMA3_FACTORS, rotary))
    found = {"rope_type": "llama3", "rope_theta": base, "factor": round(float(stored.max()), 3), **_LLAMA3}
    if not np.allclose(stored, llama3_factors(found, rotary), rtol=_CLOSE):
        raise QALoraError(f"{file.path}: {LLAMA3_FACTORS} are not Llama 3's. {_ANOTHER_CONFIG}")
    return found


def _factors(file: GgufFile, name: str, rotary: int) -> list[float]:
    tensor = file.tensors.get(name)
    if tensor is None or tensor.type != "F32" or tensor.shape != (rotary // 2,) or not (tensor.data > 0).all():
        raise QALoraError(f"{file.path}: {name} is not {rotary // 2} positive float32 factors. {_ANOTHER_CONFIG}")
    return [float(factor) for factor in tensor.data]
