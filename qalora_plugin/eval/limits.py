"""What a model takes, as its config says: how many tokens in a sequence, and which."""

from pathlib import Path
from typing import TYPE_CHECKING

from qalora_plugin.core.errors import QALoraError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def model_config(folder: str | Path) -> "PretrainedConfig":
    """
    Raises:
        QALoraError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever configs of any kind and age raise
        raise QALoraError(
            f"{Path(folder) / 'config.json'} is no model's config that transformers can read ({error}). Pass the "
            "folder of a model."
        ) from error


def positions(config: "PretrainedConfig") -> int | None:
    """Most tokens of a sequence, whatever a model's kind calls them in its config; None if it does not say.

    Models that learn an embedding for each position (GPT-2, OPT) have none beyond, and fail there.
    """
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 1 else None


def vocabulary(config: "PretrainedConfig") -> int | None:
    """Tokens that a model has embeddings and logits for; None if its config does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def fitting_length(config: "PretrainedConfig", length: int) -> int:
    """``length`` tokens of a sequence, or what the model takes if that is less."""
    return min(length, positions(config) or length)
