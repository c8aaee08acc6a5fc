"""PEFT's ``hotswap_adapter``, for adapters of one kind.

It puts other numbers, and another α/R, into layers that stay: what else of them an adapter depends on must be alike.
"""

import math
from typing import Any

from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.utils import hotswap
from torch import Tensor, nn

from qalora_plugin.checkpoint.adapter_config import Ratios, scaling_of
from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError

_OF_ITS_BASE = ("format_version", "pooling", "group_size", "base_fingerprint")
_check = hotswap.check_hotswap_configs_compatible
_swap = hotswap.hotswap_adapter_from_state_dict


def require_one_kind(config0: PeftConfig, config1: PeftConfig) -> None:
    """PEFT's check of two configs (the first is of what is loaded), and ours where one is of a QA-LoRA adapter.

    Raises:
        QALoraError: they are for other bases, or hold other numbers.
    """
    _check(config0, config1)
    mine, its = _kind(config0), _kind(config1)
    for key, value in mine.items():
        if its[key] != value:
            raise QALoraError(
                f"an adapter cannot be swapped for one of another kind: {key} is {short(its[key])}, of the one that is "
                f"loaded {short(value)}. Load it beside that one: model.load_adapter(folder, name)."
            )


def swap(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """PEFT's, and what it leaves of a QA-LoRA adapter as it was: the rank and alpha that the model's config and layers
    say, by which the adapter is saved and merged; α/R by patterns, which it takes for no linear's; and parameters that
    a higher rank has made plain tensors."""
    _swap(model, state_dict, adapter_name, config, parameter_prefix)
    known: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if getattr(known, "qalora", None) is None:
        return
    known.lora_alpha = config.lora_alpha
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        parts = (getattr(layer, f"lora_{part}", {}) for part in "ABDC")
        for factor in (part[adapter_name] for part in parts if adapter_name in part):
            weight: Any = factor.weight
            if not isinstance(weight, nn.Parameter):
                factor._parameters["weight"] = nn.Parameter(weight, requires_grad=not known.inference_mode)
        scaling = scaling_of(vars(config), name)
        hotswap._update_scaling(layer, adapter_name, scaling)
        rank = layer.lora_A[adapter_name].get_parameter("weight").shape[-2]  # PEFT fills up a lower one with zeros
        alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
        alpha = round(alpha) if math.isclose(alpha, round(alpha)) else alpha
        layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
        if not config.rank_pattern and not config.alpha_pattern:
            known.r, known.lora_alpha = rank, alpha


def _kind(config: Any) -> dict[str, Any]:
    qalora = getattr(config, "qalora", None) or {}
    kind = {key: qalora.get(key) for key in _OF_ITS_BASE}
    # A layer knows by α/R how strong PEFT has made an adapter since, scales included; PEFT swaps it for the offsets.
    strength = (scaling_of(vars(config), ""), config.rank_pattern) if qalora.get("scales") else None
    ranks = (config.r, config.rank_pattern) if qalora and (config.rank_pattern or config.alpha_pattern) else None
    return kind | {"learning rates": Ratios.of(qalora), "alpha/rank": strength, "rank by pattern": ranks}
