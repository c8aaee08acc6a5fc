"""Metadata of a GGUF file → ``config.json``.

What each key means is transformers' own table; what it leaves out is added here: the size of heads, scaled positions,
Gemma's attention scale and soft caps, Phi-3's rotated share, and llama.cpp's defaults where a key is missing.
"""

from typing import TYPE_CHECKING, Any

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.gguf.architectures import Architecture
from qalora_plugin.formats.gguf.reading import GgufFile
from qalora_plugin.formats.gguf.rope import parameters_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Layers of the one size whose attention is scaled by hidden size / heads, not by the size of heads (llama.cpp's rule).
SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}
GEMMA3_PATTERN = 6  # every sixth layer attends to everything
_WINDOW = "attention.sliding_window"
_GEMMA3_LOCAL_BASE = 10000.0


def config_of(file: GgufFile, architecture: Architecture) -> "PretrainedConfig":
    """The config of the model in a GGUF file.

    Raises:
        QALoraError: metadata is missing, absurd, or such that transformers refuses it.
    """
    from transformers import AutoConfig

    settings = _settings(file, architecture)
    try:
        return AutoConfig.for_model(architecture.model_types[0], **settings)
    except Exception as error:  # whatever the config's own checks raise
        raise QALoraError(
            f"{file.path}: its metadata make no {architecture.model_types[0]} config ({error}). Pass the original "
            "model's config: model_config=FOLDER."
        ) from error


def attention_scalar(architecture: str, layers: int, hidden: int, heads: int, head_dim: int) -> int:
    """``query_pre_attn_scalar`` as llama.cpp has it for Gemma 2 and 3."""
    return hidden // heads if layers == SCALED_BY_HIDDEN.get(architecture) else head_dim


def special_tokens(file: GgufFile) -> dict[str, int]:
    """``bos_token_id`` … as the file gives them."""
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    found = {
        f"{ours}_token_id": file.value(f"tokenizer.ggml.{theirs}_token_id", int, None) for ours, theirs in keys.items()
    }
    vocabulary = file.tensors[EMBEDDING].shape[0] if EMBEDDING in file.tensors else 0
    return {key: token for key, token in found.items() if token is not None and 0 <= token < vocabulary}


def _settings(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    from transformers.integrations import GGUF_CONFIG_MAPPING

    settings: dict[str, Any] = {}
    known: Any = GGUF_CONFIG_MAPPING[architecture.name]
    for key, setting in known.items():
        if setting and f"{file.architecture}.{key}" in file.keys:
            read = file.real if "epsilon" in key or "freq_base" in key else file.number
            settings[setting] = _window(file) if key == _WINDOW else read(key)
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None:
        raise QALoraError(f"{file.path} has no {EMBEDDING}. Is it a whole language model?")
    layers, hidden, heads = (file.number(key) for key in ("block_count", "embedding_length", "attention.head_count"))
    if layers > len(file.tensors) or hidden % heads:
        raise QALoraError(
            f"{file.path}: {layers} layers, {heads} heads for {hidden} channels cannot be. It is damaged."
        )
    head_dim = file.number("attention.key_length", hidden // heads)
    if file.number("attention.value_length", head_dim) != head_dim:
        raise QALoraError(f"{file.path}: keys and values of different sizes, which {architecture.name} has not.")
    rotary = file.number("rope.dimension_count", head_dim)
    rope = parameters_of(file, rotary)
    settings.pop("rope_theta", None)
    settings |= {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": HEAD not in file.tensors,
        "num_key_value_heads": file.number("attention.head_count_kv", heads),
        "rope_parameters": rope,
        "pad_token_id": None,
        **special_tokens(file),
    }
    if architecture.name != "phi3" and (architecture.name != "qwen2" or head_dim != hidden // heads):
        settings["head_dim"] = head_dim
    if architecture.name in ("llama", "qwen3"):
        settings["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture.name == "phi3":
        settings |= _phi3(file, rope, rotary, head_dim)
    if architecture.name in SCALED_BY_HIDDEN:
        settings |= _gemma(
            file, architecture.name, rope, attention_scalar(architecture.name, layers, hidden, heads, head_dim)
        )
    return settings


def _phi3(file: GgufFile, rope: dict[str, Any], rotary: int, head_dim: int) -> dict[str, Any]:
    rope["partial_rotary_factor"] = rotary / head_dim
    context = file.number("context_length")
    return {
        "original_max_position_embeddings": file.number("rope.scaling.original_context_length", context),
        "sliding_window": _window(file),
    }


def _window(file: GgufFile) -> int | None:
    """Of Phi-4, which has none, converters write 0, to tell it from Phi-3."""
    none = file.value(f"{file.architecture}.{_WINDOW}", int, 0) == 0
    return None if none else file.number(_WINDOW)


def _gemma(file: GgufFile, name: str, rope: dict[str, Any], scalar: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"query_pre_attn_scalar": scalar}
    if name == "gemma3":
        local = {"rope_type": "default", "rope_theta": file.real("rope.freq_base_swa", _GEMMA3_LOCAL_BASE)}
        settings["rope_parameters"] = {"sliding_attention": local, "full_attention": rope}
    known: dict[str, dict[str, float | None]] = {
        "gemma2": {"attn": 50.0, "final": 30.0},
        "gemma3": {"attn": None, "final": None},
    }
    for place, default in known[name].items():
        settings[f"{place}_logit_softcapping"] = file.real(f"{place}_logit_softcapping", default)
    return settings
