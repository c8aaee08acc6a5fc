"""The linears that Axolotl's ``lora_target_*`` keys name, known before the model is loaded."""

import logging
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from qalora_plugin.checkpoint.adapter_config import check_config_patterns
from qalora_plugin.checkpoint.patterns import matching_pattern
from qalora_plugin.core.errors import QALoraError, printable
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.integrations.peft.target_names import FIELDS, LinearNames

LOG = logging.getLogger("axolotl.qalora")
NARROWING = ("lora_exclude_modules", "peft_layers_to_transform", "peft_layers_pattern")


def check_targets(cfg: dict[str, Any], modules: dict[str, GroupwiseSpec], names: LinearNames | None = None) -> None:
    """Refuse targets that match no quantised linear of the base, by PEFT's own rules; warn of those of several.

    Args:
        names: what they are called in the model, where that is known before it is loaded: with quantized experts.

    Raises:
        QALoraError: with the names that there are.
    """
    wanted = cfg.get("lora_target_modules") or []
    patterns = {field: cfg.get(f"lora_{field}") for field in FIELDS}
    check_config_patterns(patterns, list(modules), "the config")
    if names is not None:
        names.check({field: names.as_in_model(given) for field, given in patterns.items()}, "lora_")
    if not targeted(cfg, modules, names):
        if isinstance(wanted, str) and any("language_model" in name.split(".") for name in modules):
            # A model with vision: names on disk may not be those in the model, which is known once it is loaded.
            LOG.warning("lora_target_modules: %s matches no name of the base's file", printable(wanted))
            return
        narrowed = [key for key in NARROWING if cfg.get(key)]
        raise QALoraError(
            f"lora_target_modules {wanted!r}{' with ' + ', '.join(narrowed) if narrowed else ''} matches no quantised "
            f"linear of {cfg['base_model']}. Quantised there are: {', '.join(sorted(_leaves(modules)))}. Name some of "
            "these, or set lora_target_linear: true."
        )
    known = modules if names is None else names.stored
    for pattern in (wanted if names is None else names.as_in_model(wanted)) if isinstance(wanted, list) else ():
        if not any(name == pattern or name.endswith(f".{pattern}") for name in known):
            LOG.warning(
                "lora_target_modules: %s is no quantised linear of this base and gets no adapter", printable(pattern)
            )
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        for pattern in (cfg.get(key) or ()) if names is None else names.as_in_model(cfg.get(key)) or ():
            if not any(matching_pattern([pattern], name) for name in known):
                LOG.warning("%s: %s matches no quantised linear of this base", key, printable(pattern))


def targeted(
    cfg: dict[str, Any], modules: dict[str, GroupwiseSpec], names: LinearNames | None = None
) -> dict[str, GroupwiseSpec]:
    """Those of the base's quantised linears that get an adapter, by PEFT's own rules; ``names``: in the model."""
    as_named = (lambda given: given) if names is None else names.as_in_model
    config = LoraConfig(
        target_modules=as_named(cfg.get("lora_target_modules") or [])
        if not (cfg.get("lora_target_linear") or cfg.get("lora_target_modules") == "all-linear")
        else sorted(_leaves(modules if names is None else names.stored)),
        exclude_modules=as_named(cfg.get("lora_exclude_modules") or None),
        layers_to_transform=cfg.get("peft_layers_to_transform"),
        layers_pattern=cfg.get("peft_layers_pattern"),
    )
    stored = {name: [name] for name in modules} if names is None else names.stored
    found = [on_disk for name, on_disk in stored.items() if check_target_module_exists(config, name)]
    return {name: modules[name] for on_disk in found for name in on_disk}


def _leaves(modules: Iterable[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in modules} - {"lm_head"} or {"lm_head"}
