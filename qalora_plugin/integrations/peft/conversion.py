"""PEFT rewrites adapters of model types whose layers changed in transformers 5, which must not happen to ours.

It takes gate_proj, up_proj and down_proj of *any* type listed beside Qwen2-MoE for experts that are stacked in one
tensor now, and moves them from ``target_modules`` to ``target_parameters``: DeepSeek-V2's dense layers would silently
get no adapter, and what is saved could not be loaded. Names of stored adapters are rewritten likewise. A QA-LoRA
adapter goes onto linears that are there, under the names that they have.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from peft.utils import transformers_weight_conversion as theirs


def leave_alone(config_class: type) -> None:
    """Have PEFT convert neither configs of ``config_class`` nor the adapters that belong to them.

    PEFT has no option for it. Both functions are looked up in their module at every call.
    """

    def unless_ours(convert: Callable, result: Callable) -> Callable:
        @wraps(convert)
        def convert_unless_ours(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            if any(isinstance(value, config_class) for value in given):
                return result(*args, **kwargs)
            return convert(*args, **kwargs)

        return convert_unless_ours

    def same_config(peft_config: Any, model: Any = None, conversions: Any = None) -> None:
        return None

    def same_tensors(model: Any, peft_config: Any, adapter_state_dict: dict, adapter_name: str = "default") -> dict:
        return adapter_state_dict

    theirs.convert_peft_config_for_transformers = unless_ours(theirs.convert_peft_config_for_transformers, same_config)
    theirs.convert_peft_adapter_state_dict_for_transformers = unless_ours(
        theirs.convert_peft_adapter_state_dict_for_transformers, same_tensors
    )
