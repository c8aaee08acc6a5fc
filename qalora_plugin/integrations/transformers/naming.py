"""Names on disk and names in a model. transformers renames tensors while it loads them, and each class in its own way:
``language_model.model.layers.0…`` on disk is ``model.language_model.layers.0…`` in ``Gemma3ForConditionalGeneration``.

The rules are transformers' own (``conversion_mapping``).
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Destination:
    """Where a stored tensor goes: its name in the model, and whether it is split, fused or turned on the way."""

    name: str
    converted: bool


def destinations(model: "PreTrainedModel", keys: Iterable[str], rules: list | None = None) -> dict[str, Destination]:
    """Where transformers puts each tensor of a checkpoint, whether or not the model has a place of that name.

    Args:
        model: may be on the meta device.
        keys: names on disk.
        rules: the mapping that a load uses; default: the model's.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    # A copy: rules remember whether they matched, and saving asks them.
    rules = get_model_conversion_mapping(model) if rules is None else deepcopy(rules)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    places, found = model.state_dict(), {}
    for key in sorted(keys, key=dot_natural_key):  # in the order of loading, which some rules count on
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, places)
        if name not in places and key in places:
            name, converter = rename_source_key(key, [], [], model.base_model_prefix, places)
        found[key] = Destination(name, converter is not None)
    return found


def is_ignored(model: "PreTrainedModel", name: str) -> bool:
    """True for what the class leaves in the checkpoint on purpose, as multi-token prediction layers often are."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())
