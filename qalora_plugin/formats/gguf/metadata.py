"""``config.json`` → metadata of a GGUF file, or the reason why llama.cpp would compute something else.

llama.cpp builds the graph of an architecture from few numbers and knows the rest by heart; a config that departs from
that is refused here, since nothing would stop llama.cpp from running it wrongly. (llama.cpp ``src/models``.)
"""

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf.architectures import Architecture
from qalora_plugin.formats.gguf.config import GEMMA3_PATTERN, attention_scalar
from qalora_plugin.formats.gguf.rope import metadata_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

_ACTIVATIONS = {"gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}
_ELSEWHERE = "Serve it with vLLM or transformers."


def metadata(config: "PretrainedConfig", architecture: Architecture) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys without the architecture's prefix → values (int, float, str), and the tensors that scaled positions need.

    Raises:
        Unsupported: the model is not what llama.cpp takes its architecture to be.
    """
    name, hidden, heads = architecture.name, config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    _require_known(config, name)
    rope = config.rope_parameters
    local = rope.get("sliding_attention") if name == "gemma3" else None
    rope = rope.get("full_attention", rope)
    rotary = int(head_dim * (rope.get("partial_rotary_factor") or 1))
    positions, tensors = metadata_of(
        rope, name, rotary, config.max_position_embeddings, getattr(config, "original_max_position_embeddings", None)
    )
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": _context(config, name),
        "embedding_length": hidden,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": rotary,
        "vocab_size": config.vocab_size,
        **positions,
    }
    if name in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    if local:
        if local.get("rope_type", "default") != "default":
            raise Unsupported(
                f"its local layers scale positions ({local}), which llama.cpp's gemma3 cannot.", _ELSEWHERE
            )
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    for place in ("attn", "final") if name in ("gemma2", "gemma3") else ():
        if cap := getattr(config, f"{place}_logit_softcapping", None):
            keys[f"{place}_logit_softcapping"] = float(cap)
    return keys, tensors


def _context(config: "PretrainedConfig", name: str) -> int:
    """How many tokens llama.cpp computes as the model does: where it knows no sliding window, those of one."""
    window, most = getattr(config, "sliding_window", None), config.max_position_embeddings
    if name not in ("llama", "phi3") or not window or window >= most:
        return most
    logger.warning(
        "the model attends to the last %d tokens, and llama.cpp's %s to all: the file's context length is %d, not %d.",
        window, name, window, most,
    )  # fmt: skip
    return window


def _require_known(config: "PretrainedConfig", name: str) -> None:
    """Refuse settings that llama.cpp does not read."""

    def refuse(setting: str, found: Any, expected: Any) -> None:
        raise Unsupported(f"{setting} is {found!r}, but llama.cpp's {name} has {expected!r}.", _ELSEWHERE)

    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != (expected := _ACTIVATIONS.get(name, "silu")):
        refuse("hidden_act", activation, expected)
    if getattr(config, "use_sliding_window", False):
        refuse("use_sliding_window", True, False)
    layers = config.num_hidden_layers
    if name in ("gemma2", "gemma3"):
        head_dim, hidden, heads = config.head_dim, config.hidden_size, config.num_attention_heads
        scalar = attention_scalar(name, layers, hidden, heads, head_dim)
        if config.query_pre_attn_scalar != scalar:
            refuse("query_pre_attn_scalar", config.query_pre_attn_scalar, scalar)
        period = GEMMA3_PATTERN if name == "gemma3" else 2
        kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
        if list(config.layer_types) != kinds:
            refuse("layer_types", config.layer_types, f"one full_attention in {period}")
    if name == "gemma3" and config.attn_logit_softcapping:
        refuse("attn_logit_softcapping", config.attn_logit_softcapping, None)
    if name == "gemma3" and getattr(config, "use_bidirectional_attention", None):
        refuse("use_bidirectional_attention", True, False)
