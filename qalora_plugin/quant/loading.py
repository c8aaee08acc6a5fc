"""Loading through transformers: ``quant_method: qalora`` (merged checkpoints) always, ``gptq`` (bases) on request.

Merged checkpoints load with plain ``AutoModelForCausalLM.from_pretrained`` once this package is imported. For a GPTQ
base transformers has a quantizer of its own (optimum + GPTQModel), which stays in place for everybody else:
:func:`load_base` and the Axolotl plugin put ours there only while their model loads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import QALoraError
from .checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, is_local, read_config, read_json, resolve, weights_name
from .fingerprint import fingerprint
from .linear import QuantLinear
from .modules import (
    BASE_METHOD,
    MERGED_METHOD,
    WEIGHTS_KEY,
    check_values,
    checkpoint_format,
    quantized_modules,
    require_base,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_HUB_OPTIONS = ("token", "cache_dir", "local_files_only")


class QALoraQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a merged checkpoint, kept as it was read so that it saves back the same."""

    def __init__(self, **fields: Any):
        fields["quant_method"] = MERGED_METHOD
        self.__dict__.update(fields)


class QALoraHfQuantizer(HfQuantizer):
    """Puts a :class:`QuantLinear` wherever the checkpoint has a ``qweight``; transformers then fills the buffers."""

    requires_calibration = True  # quantising is GPTQModel's job (`qalora quantize`), never done while loading

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", checkpoint_files=None, **kwargs):
        if not checkpoint_files:
            raise QALoraError(
                "a quantised model loads from safetensors files; from_config or a state_dict cannot work."
            )
        self.checkpoint = checkpoint = Checkpoint.open(_folder(checkpoint_files))
        modules = quantized_modules(checkpoint)
        check_values(checkpoint, modules)
        fmt = checkpoint_format(checkpoint.quantization)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        prefix = _prefix(model, linears, modules)
        for name, spec in modules.items():
            name = prefix(name)
            linear = linears.get(name)
            if linear is None:
                raise QALoraError(_no_such_linear(name, model, linears))
            if (linear.in_features, linear.out_features) != (spec.in_features, spec.out_features):
                raise QALoraError(
                    f"{name} is {spec.in_features}×{spec.out_features} in the checkpoint, but "
                    f"{linear.in_features}×{linear.out_features} by config.json. They do not belong together."
                )
            model.set_submodule(
                name,
                QuantLinear(
                    spec.in_features,
                    spec.out_features,
                    spec.bits,
                    spec.group_size,
                    checkpoint_format=fmt,
                    bias=spec.bias_dtype is not None,
                    offset_dtype=_dtype(spec.offset_dtype),
                    scale_dtype=_dtype(spec.scale_dtype),
                    bias_dtype=_dtype(spec.bias_dtype),
                    store_g_idx=spec.has_g_idx,
                    device="meta",
                ),
            )

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs):
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.finalize()
                module.base_fingerprint = self.base_fingerprint
        if find_spec("peft"):
            from .. import tuner  # noqa: F401 (PEFT, and so TRL, then puts our adapters on this model)
        return model

    def _lift_guard(self, config):
        """Take out of the model's config what keeps a merged checkpoint from loading where this package is not."""
        if self.quantization_config.quant_method == MERGED_METHOD and hasattr(config, WEIGHTS_KEY):
            delattr(config, WEIGHTS_KEY)
        return config

    # The hooks that see the config before transformers looks for the weights: the first up to 5.20, the second since
    # (read in 5.14 to 5.24, run in 5.16, 5.19, 5.23). Nothing of what they are there for applies to packed linears.
    update_tp_plan = update_attn_implementation = _lift_guard

    def base_fingerprint(self) -> str:
        """Fingerprint of the base this model was loaded from.

        Raises:
            QALoraError: it was loaded from a merged checkpoint. An adapter on top would be merged onto the base alone,
                and the offsets that are there already would be lost.
        """
        if self.checkpoint.method != BASE_METHOD:
            raise QALoraError(
                f"{self.checkpoint.folder} is a merged checkpoint (quant_method {self.checkpoint.method!r}); adapters "
                f"go onto a GPTQ base. Load its base ({self.checkpoint.quantization.get('base_model')}), and to go on "
                "training, the adapter that was merged."
            )
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.checkpoint)

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return self.quantization_config.quant_method == MERGED_METHOD


def register() -> None:
    """Make transformers load and save ``quant_method: qalora``. Safe to call again (reload, double import)."""
    if MERGED_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(MERGED_METHOD)(QALoraHfQuantizer)
    if MERGED_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(MERGED_METHOD)(QALoraQuantizationConfig)


@contextmanager
def gptq_loads_trainable() -> Iterator[None]:
    """Inside, transformers loads GPTQ checkpoints with :class:`QuantLinear`; outside, as it always did."""
    theirs = AUTO_QUANTIZER_MAPPING[BASE_METHOD]
    AUTO_QUANTIZER_MAPPING[BASE_METHOD] = QALoraHfQuantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[BASE_METHOD] = theirs


def load_base(path: str | Path, revision: str | None = None, **kwargs: Any) -> "PreTrainedModel":
    """Load a GPTQ checkpoint for training: packed weights, no optimum, no GPTQModel.

    Args:
        path: local folder or Hub id.
        revision: Hub revision.
        kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (``dtype``, ``device_map`` …).

    Raises:
        QALoraError: not a usable GPTQ base; the message says why.
    """
    from transformers import (  # not at import: vLLM's environment imports this package too
        AutoConfig,
        AutoModelForCausalLM,
    )

    folder = resolve(path, revision, **{key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs})
    require_base(Checkpoint.open(folder))
    if overrides := config_overrides(folder):
        config = kwargs.get("config") or AutoConfig.from_pretrained(folder)
        config.update(overrides)
        kwargs["config"] = config
    with gptq_loads_trainable():
        model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    if not is_local(path):
        # A Hub id: what PEFT writes down as the adapter's base must not be a folder of this machine's cache.
        model.name_or_path = model.config.name_or_path = str(path)
    return model


def config_overrides(folder: Path) -> dict[str, Any]:
    """What transformers must be told of a base because its ``config.json`` does not say it; ``{}`` for most.

    Of AutoGPTQ's older folders: the quantisation, and which file holds the weights.
    """
    config = read_config(folder)
    weights = weights_name(folder, config)
    overrides = {} if weights in (SINGLE_NAME, INDEX_NAME) else {WEIGHTS_KEY: weights}
    if not read_json(folder / "config.json").get("quantization_config") and config.get("quantization_config"):
        overrides["quantization_config"] = config["quantization_config"]
    return overrides


def _no_such_linear(name: str, model: "PreTrainedModel", linears: dict[str, nn.Linear]) -> str:
    found = f"the checkpoint quantises {name}, but {type(model).__name__} has no such linear layer"
    if ".experts." in name:
        return f"{found}: it runs mixture-of-experts layers fused, which is not supported yet. Use a dense model."
    leaf = name.rpartition(".")[2]
    alike = next((other for other in linears if other.rpartition(".")[2] == leaf), next(iter(linears), "none"))
    return (
        f"{found} (its own are named like {alike}). The checkpoint's names are those of another model class than "
        f"config.json's {', '.join(model.config.architectures or ['(none named)'])}."
    )


def _folder(checkpoint_files: list[str]) -> Path:
    """The model folder of transformers' resolved shard paths (in the Hub cache, links inside a snapshot folder)."""
    return Path(checkpoint_files[0]).parent


def _prefix(model: "PreTrainedModel", linears: dict, modules: dict):
    """Checkpoint name → module name: the identity, or without the base-model prefix for a headless ``AutoModel``."""
    head = f"{model.base_model_prefix}."
    bare = bool(modules) and not any(name in linears for name in modules)
    return (lambda name: name.removeprefix(head)) if bare else (lambda name: name)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


register()  # on import: see qalora_plugin.registration
