"""Dense models, loaded whole or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.transformers.loading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_dense(folder: Path, name: str, **kwargs: Any) -> "PreTrainedModel":
    """A dense model, of which transformers would make up at random what its folder lacks, and only warn; what it has in
    another shape is refused by name, too.

    Args:
        name: for the error. kwargs: of :func:`~.loading.load_model`.

    Raises:
        QALoraError: the folder lacks a tensor of the model, or has one in another shape.
    """
    found: Any = load_model(
        folder,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # for the names; its error has none
        **kwargs,
    )
    model, info = found
    if missing := sorted(info["missing_keys"]):
        raise QALoraError(
            f"{name} lacks {missing[0]} ({len(missing)} tensors in all) of a {type(model).__name__}. Download or copy "
            "the folder again."
        )
    if wrong := sorted(info["mismatched_keys"]):  # where an expert is lacking, too: they are stacked
        key, *shapes = wrong[0]
        stored, wanted = ("×".join(map(str, shape)) for shape in shapes)
        raise QALoraError(
            f"{name} gives {key} as {stored}, but {type(model).__name__} has {wanted} by config.json. Download or copy "
            "the folder again."
        )
    return model


def empty_model(folder: Path, name: str | None = None) -> "PreTrainedModel":
    """The model of a folder on the meta device: loaded as any, by transformers' own rules, but for the reading.

    Args:
        name: for errors; default: the folder.

    Raises:
        QALoraError: transformers cannot load it, or the folder lacks a tensor of it or has one in another shape.
    """
    from transformers.utils import logging

    name = str(folder) if name is None else name
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load_dense(folder, name, device_map="meta")
    except QALoraError:
        raise
    except Exception as error:  # whatever configs of any kind and age raise
        raise QALoraError(
            f"{name} cannot be loaded as a 16-bit model ({type(error).__name__}: {error}). Repair or update what "
            "that names, or use another model."
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
