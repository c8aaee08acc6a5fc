"""PEFT's ``hotswap_adapter``, for adapters of one kind.

It puts other numbers, and another α/R, into layers that stay: what else of them an adapter depends on must be alike.
"""

from typing import Any

from peft import PeftConfig
from peft.utils import hotswap

from qalora_plugin.checkpoint.adapter_config import Ratios, scaling_of
from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError

_OF_ITS_BASE = ("format_version", "pooling", "group_size", "base_fingerprint")
_check = hotswap.check_hotswap_configs_compatible


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


def _kind(config: Any) -> dict[str, Any]:
    qalora = getattr(config, "qalora", None) or {}
    kind = {key: qalora.get(key) for key in _OF_ITS_BASE}
    # A layer knows by α/R how strong PEFT has made an adapter since, scales included; PEFT swaps it for the offsets.
    strength = (scaling_of(vars(config), ""), config.rank_pattern) if qalora.get("scales") else None
    return kind | {"learning rates": Ratios.of(qalora), "alpha/rank": strength}
