"""Dense models, loaded whole or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.transformers.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_dense(folder: Path, name: str, **kwargs: Any) -> "PreTrainedModel":
    """A dense model, of which transformers would make up at random what its folder lacks, and only warn.

    Args:
        name: for the error. kwargs: of :func:`~.loading.load_model`.

    Raises:
        QALoraError: the folder lacks a tensor of the model.
    """
    found: Any = load_model(folder, trust_remote_code=False, output_loading_info=True, **kwargs)
    model, info = found
    if missing := sorted(info["missing_keys"]):
        raise QALoraError(
            f"{name} lacks {missing[0]} ({len(missing)} tensors in all) of a {type(model).__name__}. Download or copy "
            "the folder again."
        )
    return model
