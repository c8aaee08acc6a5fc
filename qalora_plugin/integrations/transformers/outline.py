"""The model of a base without its weights: what can be refused before it is loaded, and how it names linears."""

import logging
import re
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.integrations.transformers.dense_parts import require_shape
from qalora_plugin.integrations.transformers.loading import auto_class
from qalora_plugin.integrations.transformers.naming import Destination, destinations
from qalora_plugin.integrations.transformers.placing import place_linears
from qalora_plugin.integrations.transformers.placing_experts import place_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def outline(base: QuantizedCheckpoint) -> "tuple[PreTrainedModel, dict[str, list[str]]] | None":
    """The model on the meta device, packed linears in place, and each one's names on disk by its name in the model:
    one, or those of all experts.

    Returns:
        None where transformers makes no such model by itself.

    Raises:
        QALoraError: linears or experts are not those of the model (:func:`place_linears`, :func:`place_experts`), or
            the checkpoint has nothing of a module.
    """
    try:
        model = _built(base)
    except Exception as error:  # a class of the checkpoint's own, a config of another version: loading will tell
        logger.debug("no outline of %s: %s", base.folder, error)
        return None
    found = destinations(model, [f"{name}.weight" for name in base.specs])
    experts = place_experts(model, base, found)
    placed = {spec.name for projection in experts.values() for spec in projection.specs}
    _require_dense_parts(model, base, found)
    linears = place_linears(model, base, found, placed)
    rest = {name: [stored] for name, stored in linears.items()}
    return model, rest | {name: [spec.name for spec in one.specs] for name, one in experts.items()}


def why_not_built(base: QuantizedCheckpoint) -> str | None:
    """Why transformers makes no model of this config.json; None if it does, or if code of the folder's own may."""
    if base.files.config.get("auto_map"):
        return None
    try:
        _built(base)
    except Exception as error:  # a bad value ends in whatever it leads to
        return (
            f"transformers {version('transformers')} makes no model of {base.folder / 'config.json'} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Compare it with the original's, or "
            "update transformers."
        )
    return None


def _built(base: QuantizedCheckpoint) -> "PreTrainedModel":
    from transformers import AutoConfig  # not at import: vLLM's environment imports this package, too

    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return auto_class(config, None).from_config(config)


def _require_dense_parts(model: "PreTrainedModel", base: QuantizedCheckpoint, found: dict[str, Destination]) -> None:
    """Every module with tensors of its own (a router, the experts of a layer) is in the checkpoint, and dense ones in
    its shape. (Loading looks at each tensor.)"""
    from transformers.conversion_mapping import get_model_conversion_mapping

    state = model.state_dict()
    places = destinations(model, base.files.tensors)
    stored = {place.name for place in (*places.values(), *found.values())}
    there = {name.rpartition(".")[0] for name in stored} | {*model.all_tied_weights_keys}
    rules = get_model_conversion_mapping(model)
    split = [target for rule in rules if len(rule.target_patterns) > 1 for target in rule.target_patterns]
    for name in state:
        if name.rpartition(".")[0] in there or name in there or any(target in name for target in split):
            continue
        if not any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ()):
            raise QALoraError(
                f"{base.folder} has no {name.rpartition('.')[0]}, neither quantised nor dense, which "
                f"{type(model).__name__} has by config.json: it would be made up at random. Download or copy the "
                "checkpoint again."
            )
    for key, place in places.items():
        if not place.converted and place.name in state and place.name not in model.all_tied_weights_keys:
            require_shape(model, place.name, base.files.tensors[key].shape, state[place.name].shape, base.folder)
