"""Loading through transformers: ``quant_method: qalora`` (ours, merged or imported) always, GPTQ bases on request.

Checkpoints of ours load with plain ``AutoModelForCausalLM.from_pretrained`` where this package is installed. For GPTQ
transformers has a quantizer of its own (optimum + GPTQModel), which stays as it is for everybody: :func:`load_base` and
the Axolotl plugin ask for ours by another name of the method, :data:`TRAINABLE_GPTQ`, in the config they load with.
"""

from copy import deepcopy
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.configuration_utils import PretrainedConfig
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qalora_plugin.checkpoint.folder import INDEX_NAME, SINGLE_NAME, read_config, weights_name
from qalora_plugin.checkpoint.hub import is_local, resolve
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.autoround import AutoRound
from qalora_plugin.formats.gptq import Gptq
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.qalora import WEIGHTS_KEY, QALora
from qalora_plugin.integrations.transformers.dense_parts import (
    add_stand_in,
    dense_dtypes,
    dense_shapes,
    refuse_missing,
    remove_stand_in,
    require_shapes,
    restore_dtypes,
)
from qalora_plugin.integrations.transformers.launched import is_sent_its_weights
from qalora_plugin.integrations.transformers.naming import destinations
from qalora_plugin.integrations.transformers.placing import place_linears, require_every_tensor
from qalora_plugin.integrations.transformers.placing_experts import experts_as_stored, place_experts, read_experts
from qalora_plugin.integrations.transformers.stored_tensors import adopt_stored, as_stored
from qalora_plugin.layers.experts import QuantExpertLinear
from qalora_plugin.layers.linear import QuantLinear

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


TRAINABLE_GPTQ = "qalora_gptq"  # never on disk
_OF_LOADING = ("dtype", "torch_dtype", "attn_implementation", "quantization_config")  # what configs have, too
_HUB_OPTIONS = ("token", "cache_dir", "local_files_only")


class QALoraQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a checkpoint, kept as it was read so that it saves back the same."""

    def __init__(self, **fields: Any):
        self.__dict__.update({"quant_method": QALora.method, **fields})


class QALoraHfQuantizer(HfQuantizer):
    """Puts a :class:`QuantLinear` wherever the checkpoint has a ``qweight``; transformers then fills the buffers.

    Attributes:
        checkpoint: what the model is loaded from.
        names: the packed linears, name in the model → name on disk. Of experts, which are one module in the model, the
            name on disk but for their numbers.
    """

    requires_calibration = True  # quantising is GPTQModel's job (`qalora quantize`), never done while loading

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise QALoraError(
                "a quantised model loads from safetensors files; from_config or a state_dict cannot work."
            )
        self.opened = QuantizedCheckpoint.open(_folder(checkpoint_files))
        self.opened.check_values()
        if not is_sent_its_weights():
            self.opened.check_dense_values()
        self.checkpoint = self.opened.files
        found = destinations(model, [f"{name}.weight" for name in self.opened.specs])
        self._experts = place_experts(model, self.opened, found)
        placed = {spec.name for projection in self._experts.values() for spec in projection.specs}
        self._linears = place_linears(model, self.opened, found, placed)
        self.names = self._linears | {name: projection.stored for name, projection in self._experts.items()}
        self._model, self._dtypes, self._shapes = model, dense_dtypes(model), dense_shapes(model)
        refuse_missing(model, self.checkpoint.folder)
        for name in self._linears:
            add_stand_in(cast(QuantLinear, model.get_submodule(name)))

    def update_device_map(self, device_map: Any) -> Any:
        """Without an accelerator the CPU is the only place, though launchers name the device of each process's rank."""
        if not isinstance(device_map, dict) or torch.accelerator.is_available():
            return device_map
        return {name: place if str(place) in ("meta", "disk") else "cpu" for name, place in device_map.items()}

    def update_weight_conversions(self, weight_conversions: list) -> list:
        """Called with the rules by which tensors are about to be renamed: hold the packed linears against them."""
        require_every_tensor(self._model, self.checkpoint, self._linears, weight_conversions)
        return super().update_weight_conversions(weight_conversions)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        if getattr(getattr(model.config, "distributed_config", None), "tp_size", 1) > 1:
            raise QALoraError(
                "transformers' tensor parallelism cannot split packed linears. Load the model without tp_plan (and "
                "without tp_size in a distributed_config), or serve it tensor parallel in vLLM."
            )
        require_shapes(model, self._shapes, self.checkpoint.folder)
        restore_dtypes(model, self._dtypes)
        for name, stored in self._linears.items():
            layer = cast(QuantLinear, model.get_submodule(name))
            remove_stand_in(layer)
            adopt_stored(layer, self.opened.specs[stored], self.opened.format, self.checkpoint.tensor)
        if not all(parameter.is_meta for parameter in model.parameters()):  # else a rank that has read them sends them
            for name, projection in self._experts.items():
                read_experts(cast(QuantExpertLinear, model.get_submodule(name)), projection, self.opened)
        for name in self.names:
            layer = cast(QuantLinear, model.get_submodule(name))
            layer.base_fingerprint = self.base_fingerprint
        del self._model, self._dtypes, self._shapes
        if find_spec("peft"):
            from qalora_plugin.integrations.peft import tuner  # noqa: F401 (PEFT, and so TRL, then puts our adapters on this model)
        return model

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, "Tensor"], dict[str, str]]:
        """What ``save_pretrained`` writes: the packed linears as they were loaded.

        With an adapter that ``model.add_adapter`` put on it, that is the adapter, which transformers picks out.
        """
        state = model.state_dict()
        if getattr(model, "_hf_peft_config_loaded", False):
            return state, {}
        for name in self.names:
            for part in model.get_submodule(name).state_dict():
                del state[f"{name}.{part}"]
        for name, stored in self._linears.items():
            linear = cast(QuantLinear, model.get_submodule(name))
            state |= as_stored(linear, name, self.opened.specs[stored], self.opened.format)
        for name, projection in self._experts.items():
            experts = cast(QuantExpertLinear, model.get_submodule(name))
            state |= experts_as_stored(experts, name, projection, self.opened.format)
        return state, {}

    def _lift_guard(self, config: Any) -> Any:
        """Take out of the model's config what keeps a merged checkpoint from loading where this package is not."""
        if self.quantization_config.quant_method == QALora.method and hasattr(config, WEIGHTS_KEY):
            delattr(config, WEIGHTS_KEY)
        return config

    # The hooks that see the config before transformers looks for the weights: the first up to 5.20, the second since
    # (read in 5.14 to 5.24, run in 5.16, 5.19 and 5.23). Nothing of what they are there for applies to packed linears.
    update_tp_plan = update_attn_implementation = _lift_guard

    def base_fingerprint(self, like: str | None = None) -> str:
        """Fingerprint of the base this model was loaded from, of the kind that ``like`` is."""
        kind = (like or "").partition(":")[0]
        if kind not in self._fingerprints:
            self._fingerprints[kind] = self.opened.fingerprint(like)
        return self._fingerprints[kind]

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        return {}

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return self.quantization_config.quant_method == QALora.method


def register() -> None:
    """Make transformers load both methods, and save ``qalora``. Safe to call again (reload, double import)."""
    for method in (QALora.method, TRAINABLE_GPTQ):
        if method not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(method)(QALoraHfQuantizer)
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            register_quantization_config(method)(QALoraQuantizationConfig)


def load_base(path: str | Path, revision: str | None = None, **kwargs: Any) -> "PreTrainedModel":
    """Load a quantized checkpoint (GPTQ, or ours) for training: packed weights, no optimum, no GPTQModel.

    Args:
        path: local folder or Hub id.
        revision: Hub revision.
        kwargs: passed to ``from_pretrained`` of the model's Auto class (``dtype``, ``device_map`` …); ``model_class``
            names another class than the config does, as :func:`load_model` takes it.

    Raises:
        QALoraError: not a usable base; the message says why.
    """
    from transformers import AutoConfig  # not at import: vLLM's environment imports this package too

    folder = resolve(path, revision, **{key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs})
    QuantizedCheckpoint.open(folder)
    if overrides := config_overrides(folder):
        if (config := deepcopy(kwargs.get("config"))) is None:
            config = AutoConfig.from_pretrained(folder, **_config_options(kwargs))
            for key in [key for key in kwargs if hasattr(config, key) and key not in _OF_LOADING]:
                setattr(config, key, kwargs.pop(key))  # from_pretrained does so only with a config that it makes itself
        config.update(overrides)
        kwargs["config"] = config
    if is_sent_its_weights():
        kwargs.setdefault("device_map", "meta")
    model = load_model(folder, **kwargs)
    if not is_local(path):
        # A Hub id: what PEFT writes down as the adapter's base must not be a folder of this machine's cache.
        model.name_or_path = model.config.name_or_path = str(path)
    return model


def config_overrides(folder: Path) -> dict[str, Any]:
    """What transformers must be told of a base that its ``config.json`` does not say; ``{}`` for one of ours.

    Of GPTQ: that our quantizer is to load it. Of AutoGPTQ's older folders also which file holds the weights.
    """
    config = read_config(folder)
    weights = weights_name(folder, config)
    overrides = {} if weights in (SINGLE_NAME, INDEX_NAME) else {WEIGHTS_KEY: weights}
    return overrides | trainable(config.get("quantization_config") or {})


def trainable(quantization: dict[str, Any]) -> dict[str, Any]:
    """The override for a ``quantization_config`` of a base in GPTQ's layout, ``{}`` for others."""
    if quantization.get("quant_method") not in (Gptq.method, AutoRound.method):
        return {}
    return {"quantization_config": quantization | {"quant_method": TRAINABLE_GPTQ}}


def load_model(folder: str | Path, model_class: str | None = None, **kwargs: Any) -> "PreTrainedModel":
    """Load a base or merged checkpoint as the class that its config names, a text model or one with vision or audio.

    Args:
        model_class: name of another class, such as the text model alone; it must be one that an Auto class makes.
        kwargs: passed to ``from_pretrained``.

    Raises:
        QALoraError: transformers has no model of this type that continues text.
    """
    from transformers import AutoConfig  # not at import: vLLM's environment imports this package, too

    config = kwargs.get("config")
    if not isinstance(config, PretrainedConfig):
        config = AutoConfig.from_pretrained(config or folder, **_config_options(kwargs))
    return auto_class(config, model_class).from_pretrained(folder, **kwargs)


def auto_class(config: "PretrainedConfig", model_class: str | None) -> Any:
    """The Auto class that makes ``model_class``, else the config's own architecture, else any model of its type."""
    from transformers.models.auto import modeling_auto as auto

    classes = (auto.AutoModelForCausalLM, auto.AutoModelForImageTextToText, auto.AutoModelForMultimodalLM)
    remote = getattr(config, "auto_map", None) or {}
    made = {}
    for cls in classes:
        if cls.__name__ in remote:
            return cls
        if type(config) in cls._model_mapping:
            models: Any = cls._model_mapping[type(config)]
            made[cls] = {model.__name__ for model in (models if isinstance(models, tuple) else (models,))}
    for wanted in (model_class, *(config.architectures or ())):
        for cls, names in made.items():
            if wanted in names:
                return cls
    if not made:
        raise QALoraError(
            f"model_type {config.model_type!r} is no model that continues text, as this version of transformers knows "
            "them (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM). Update transformers, "
            "or use another base."
        )
    return next(iter(made))


def _config_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained``'s that the config, which comes before the model, needs too."""
    return {key: kwargs[key] for key in (*_HUB_OPTIONS, "trust_remote_code") if key in kwargs}


def _folder(checkpoint_files: list[str]) -> Path:
    """The model folder of transformers' resolved shard paths (in the Hub cache, links inside a snapshot folder)."""
    return Path(checkpoint_files[0]).parent


register()  # on import: see qalora_plugin.registration
