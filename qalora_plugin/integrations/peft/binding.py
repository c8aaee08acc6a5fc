"""A ``LoraConfig`` made ours: bound to the base of a loaded model, and aimed at its quantized linears alone."""

import logging
import re
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qalora_plugin.checkpoint.adapter_config import (
    ADAPTER_FORMAT,
    OFFSETS_LR_RATIO,
    POOLING,
    SCALES_FORMAT,
    SCALES_LR_RATIO,
    WISHES,
    check_config_patterns,
    check_wishes,
)
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.module_names import shorten
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraConfig, QALoraLayer
from qalora_plugin.integrations.peft.target_names import FIELDS, LinearNames
from qalora_plugin.integrations.transformers.naming import destinations
from qalora_plugin.layers.experts import QuantExpertLinear, QuantExperts
from qalora_plugin.layers.linear import QuantLinear, ReadableQuantLinear

logger = logging.getLogger(__name__)

_WITH_A_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

_DENSE_LAYERS = (
    nn.Linear,
    Conv1D,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.MultiheadAttention,
)  # PEFT's


def bind_config(
    model: PreTrainedModel, config: LoraConfig, scales: bool | None = None, scales_lr_ratio: float | None = None
) -> QALoraConfig:
    """``config`` as a :class:`QALoraConfig` that names the base of ``model`` and targets only its quantised linears.

    Args:
        scales, scales_lr_ratio: of :class:`QALoraConfig`; default: as ``config`` asks for, if it does.
    """
    require_new_base(model)
    if (task := getattr(config.task_type, "value", config.task_type)) in _WITH_A_HEAD:
        raise QALoraError(
            f"task_type {task!r} trains a head of its own beside the adapter, which no merge could hold. Use "
            "'CAUSAL_LM'."
        )
    quantizer: Any = model.hf_quantizer
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    given = getattr(config, "qalora", None) or {}
    wishes = {key: given[key] for key in WISHES if given.get(key) is not None}
    wishes |= {key: value for key, value in zip(WISHES, (scales, scales_lr_ratio), strict=True) if value is not None}
    check_wishes(wishes, "the adapter's config")
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    for name in ("peft_type", "runtime_config", "qalora"):
        fields.pop(name, None)
    require_own_embeddings(model, quantizer.checkpoint)
    bound = QALoraConfig(**fields)
    targets = aim(model, bound)
    group_sizes = {layers[name].group_size for name in targets}
    bound.qalora = {
        "format_version": ADAPTER_FORMAT,
        "pooling": POOLING,
        "group_size": group_sizes.pop() if len(group_sizes) == 1 else None,
        "base_fingerprint": quantizer.base_fingerprint(),
        "model_class": type(model).__name__,
    }
    if wishes.get("scales"):
        ratio = float(wishes.get("scales_lr_ratio", SCALES_LR_RATIO))
        ratios = {"offsets_lr_ratio": OFFSETS_LR_RATIO, "scales_lr_ratio": ratio}
        bound.qalora |= {"format_version": SCALES_FORMAT, "scales": True, **ratios}
    if prefixes := shorten({name: quantizer.names[name] for name in targets}):
        bound.qalora["names"] = prefixes
    return bound


def aim(model: PreTrainedModel, config: QALoraConfig) -> list[str]:
    """Turn ``config``'s targets to the quantized linears alone, by their names in the model; returns these linears.

    Raises:
        QALoraError: none, or something that can have no adapter.
    """
    if not config.target_modules:
        raise QALoraError("no target_modules are given. Pass target_modules='all-linear', or names of linears.")
    modules = _without_adapters(model)
    layers = {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}
    quantizer: Any = model.hf_quantizer
    names = _linear_names(modules, quantizer.names, layers)
    for field in FIELDS:
        setattr(config, field, names.as_in_model(getattr(config, field)))
    check_config_patterns(vars(config), list(layers), "the adapter's config")  # what no merge would read later
    names.check(vars(config))
    return _restrict_to_quantized(model, config, modules, layers)


def _without_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, as if those that have an adapter had none."""
    found, inside = {}, "\0"
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, QALoraLayer):
            inside, module = f"{name}.", module.get_base_layer()
        found[name] = module
    return found


def require_new_base(model: nn.Module) -> None:
    """Refuse what :func:`load_base` has not loaded, or what has an adapter already."""
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if not linears or not hasattr(getattr(model, "hf_quantizer", None), "base_fingerprint"):
        raise QALoraError(
            f"this {type(model).__name__} was not loaded by qalora_plugin.load_base: it has no packed GPTQ linear. "
            "Load the base with load_base(path), then add the adapter."
        )
    if any(isinstance(module, QALoraLayer) for module in model.modules()):
        raise QALoraError(
            "this model has an adapter already. Put a saved one beside it with model.load_adapter(folder, name), a new "
            "one with model.add_adapter(name, config), or begin with load_base(path)."
        )


def _linear_names(modules: Iterable[str], names: dict[str, str], layers: dict[str, QuantLinear]) -> LinearNames:
    stored = {}
    for name, layer in layers.items():
        parent, _, leaf = names[name].rpartition(".")
        experts = range(layer.experts) if isinstance(layer, QuantExpertLinear) else ()
        stored[name] = [f"{parent}.{i}.{leaf}" for i in experts] or [names[name]]
    return LinearNames(stored, modules)


def require_own_embeddings(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Refuse embeddings that were resized for new tokens: PEFT would save them, and a merge could not hold them."""
    embeddings: Any = model.get_input_embeddings()
    names = {f"{name}.weight" for name, module in model.named_modules() if module is embeddings}
    keys = (key for key, place in destinations(model, checkpoint.tensors).items() if place.name in names)
    stored = checkpoint.tensors.get(next(keys, ""))
    if stored and stored.shape[0] != len(embeddings.weight):
        raise QALoraError(
            f"the embeddings were resized from {stored.shape[0]} to {len(embeddings.weight)} tokens, but a merged "
            "checkpoint has the base's. Use tokens that the base's tokenizer has already, for padding, too."
        )


def _restrict_to_quantized(
    model: PreTrainedModel, config: QALoraConfig, modules: dict[str, nn.Module], layers: dict[str, QuantLinear]
) -> list[str]:
    """Exclude what the target patterns match besides, saying so; returns the quantised linears that get an adapter."""
    every = config.target_modules == "all-linear"
    if every:
        head = model.get_output_embeddings()
        targets = {_pattern(name) for name, layer in layers.items() if layer is not head}
        config.target_modules = targets  # type: ignore[assignment]  # PEFT itself makes a set of a list
    matched = {
        name: isinstance(module, (*_DENSE_LAYERS, QuantLinear, QuantExperts))
        for name, module in modules.items()
        if name and check_target_module_exists(config, name)
    }
    known = {_leaf(name) for name in layers}  # dense layers of other kinds that are called like them are no targets
    strange = (name for name, can_have_one in matched.items() if not (can_have_one or every or _leaf(name) in known))
    if other := next(strange, None):
        raise QALoraError(
            f"target_modules match {other}, a {type(modules[other]).__name__}, which can have no adapter. "
            f"Name linears: {_leaves(layers)}."
        )
    barred = {name for name in layers if name in matched and _is_barred(config, model, name, layers[name])}
    quantised = [name for name in layers if name in matched.keys() - barred]
    holders = {name for name in matched if isinstance(modules[name], QuantExperts)}  # of what is matched
    dense = matched.keys() - layers.keys() - holders
    if not quantised:
        found = sorted(dense) or sorted(barred)
        raise QALoraError(
            f"target_modules {config.target_modules!r} match no quantised linear of this base that can have an adapter "
            f"(they match {', '.join(found[:3]) or 'nothing'}). Quantised here are: "
            f"{_leaves(layers)}."
        )
    excluded = sorted(dense | barred | holders)
    if excluded:
        config.exclude_modules = sorted({*_names_excluded(config, modules), *excluded})
    if dense:
        logger.warning("%d targeted layers are left dense by this base and get no adapter: %s", *_counted(dense))
    if barred:
        logger.warning(
            "%d targeted linears get no adapter, because fused Mamba kernels would leave it out: %s", *_counted(barred)
        )
    return quantised


def _names_excluded(config: QALoraConfig, modules: dict[str, nn.Module]) -> Iterable[str]:
    """Of a pattern those linears that it matches: with more names in it it would be as long as the model is deep."""
    if not isinstance(config.exclude_modules, str):
        return config.exclude_modules or ()
    kinds = (*_DENSE_LAYERS, QuantLinear, QuantExperts, QuantExpertLinear)
    pattern = re.compile(config.exclude_modules)
    return [name for name, module in modules.items() if isinstance(module, kinds) and pattern.fullmatch(name)]


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(map(_leaf, names))))


def _pattern(name: str) -> str:
    """What targets a linear: its last name, unless that is a number, as every layer's is."""
    leaf = _leaf(name)
    return name if leaf.isdigit() else leaf


def _is_barred(config: QALoraConfig, model: PreTrainedModel, name: str, layer: QuantLinear) -> bool:
    """True for a linear that a fused Mamba kernel computes instead, without its adapter; PEFT refuses some of them."""
    if isinstance(layer, ReadableQuantLinear):
        return True
    try:
        _check_lora_target_modules_mamba(config, model, _leaf(name))
    except ValueError:
        return True
    return False


def _counted(names: set[str]) -> tuple[int, str]:
    return len(names), f"{_leaves(names)} ({min(names)} …)"
