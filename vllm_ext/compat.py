"""What differs between the versions of vLLM that are served, 0.26 to 0.33; nothing else in this package asks for one.

Run with 0.26.0 and 0.32.0; with 0.33.0 all but whole models. Kernel choice moved ``has_g_idx`` out of
``MPLinearLayerConfig`` after 0.26, and weight loading drops ``*.g_idx`` by default since 0.32.
"""

import dataclasses
import logging
import re
from typing import Any, TypeAlias

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.qalora import QALora

OLDEST = (0, 26)
Layer: TypeAlias = Any  # a module of vLLM's; what it holds are attributes, which torch types as tensors or modules


def problem(version: str) -> str | None:
    """Why this version of vLLM cannot serve qalora; None if it can. Development builds ("0.1.dev…") are let through."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or "dev" in version or tuple(map(int, match.groups())) >= OLDEST:
        return None
    oldest = ".".join(map(str, OLDEST))
    return (
        f"qalora needs vLLM {oldest} or newer, this is {version}. Update it (pip install 'vllm>={oldest}'), or serve "
        "the adapter unmerged: qalora export lora."
    )


def register_refusal(problem: str) -> None:
    """Register ``qalora`` as a method that refuses every checkpoint with ``problem``."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    def refuse(*_: Any, **__: Any) -> Any:
        raise QALoraError(problem)

    names = ("get_name", "get_supported_act_dtypes", "get_min_capability", "get_config_filenames", "from_config")
    if QALora.method not in QUANTIZATION_METHODS:
        refusal = type("QALoraRefusal", (QuantizationConfig,), {name: classmethod(refuse) for name in names})
        register_quantization_config(QALora.method)(refusal)


def kernel_config(**values: Any) -> Any:
    """vLLM's ``MPLinearLayerConfig`` of these values, for columns in order."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig

    known = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
    if "has_g_idx" in known:
        values["has_g_idx"] = False
    return MPLinearLayerConfig(**values)


def loads_from_files() -> bool:
    """Whether vLLM's loader gives a layer every tensor that the checkpoint's files hold. (Not ``dummy``, nor those that
    set parameters themselves.)"""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().load_config.load_format in ("auto", "hf", "safetensors")


def silence_unpacked_zeros() -> None:
    """Keep vLLM from warning, for each linear, that ``qzeros`` is stored as int32 and loaded as uint8: it is unpacked.

    (``AutoWeightsLoader``, 0.32. Its warnings of other tensors stay.)
    """

    def is_news(record: logging.LogRecord) -> bool:
        first = record.args[0] if isinstance(record.args, tuple) and record.args else ""
        return not ("Attempted to load weight" in str(record.msg) and str(first).endswith(".qzeros"))

    logger = logging.getLogger("vllm.model_executor.models.utils")
    if not any(getattr(known, "__name__", "") == is_news.__name__ for known in logger.filters):
        logger.addFilter(is_news)


def load_every_tensor(renamed: dict[str, str]) -> Any:
    """A weight mapper that drops nothing: ``g_idx``, which vLLM would drop, is needed to serve act-order.

    Args:
        renamed: parts of tensors' names → what they become.
    """
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(orig_to_new_substr=renamed)


def is_experts(layer: Any) -> bool:
    """Whether a layer holds a mixture-of-experts layer's experts. (GPT-OSS's are of a class of its own.)"""
    return not _names(layer).isdisjoint(("RoutedExperts", "FusedMoE"))


def experts_problem(layer: Any) -> str | None:
    """Why quantized experts in this layer cannot be served; None if they can."""
    kind, moe = type(layer).__name__, getattr(layer, "moe_config", None)
    if "RoutedExperts" not in _names(layer):
        return (
            "qalora serves quantized experts on vLLM 0.32 or newer, where they are a layer of their own "
            "(RoutedExperts). Update it (pip install 'vllm>=0.32')."
        )
    if kind != "RoutedExperts":
        return (
            f"vLLM has a class of its own for this model's experts ({kind}), into which quantized ones do not load. "
            "Serve the merged checkpoint with transformers."
        )
    if any(getattr(moe, name, None) is not None for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")):
        return (
            "this model clips or scales what its experts' gates give (swiglu_limit), which is not served. Serve the "
            "merged checkpoint with transformers."
        )
    return None


def _names(layer: Any) -> set[str]:
    """Of its class and those that this extends."""
    return {cls.__name__ for cls in type(layer).__mro__}
