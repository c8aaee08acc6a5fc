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

from transformers.configuration_utils import PretrainedConfig
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
from .dense_parts import add_stand_in, dense_dtypes, remove_stand_in, restore_dtypes
from .fingerprint import fingerprint
from .linear import QuantLinear
from .modules import BASE_METHOD, MERGED_METHOD, WEIGHTS_KEY, check_values, quantized_modules, require_base
from .placing import place_linears, require_every_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_HUB_OPTIONS = ("token", "cache_dir", "local_files_only")


class QALoraQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of a merged checkpoint, kept as it was read so that it saves back the same."""

    def __init__(self, **fields: Any):
        fields["quant_method"] = MERGED_METHOD
        self.__dict__.update(fields)


class QALoraHfQuantizer(HfQuantizer):
    """Puts a :class:`QuantLinear` wherever the checkpoint has a ``qweight``; transformers then fills the buffers.

    Attributes:
        checkpoint: what the model is loaded from.
        names: the packed linears, name in the model → name on disk.
    """

    requires_calibration = True  # quantising is GPTQModel's job (`qalora quantize`), never done while loading

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", checkpoint_files=None, **kwargs):
        if not checkpoint_files:
            raise QALoraError(
                "a quantised model loads from safetensors files; from_config or a state_dict cannot work."
            )
        self.checkpoint = checkpoint = Checkpoint.open(_folder(checkpoint_files))
        modules = quantized_modules(checkpoint)
        check_values(checkpoint, modules)
        self.names = place_linears(model, checkpoint, modules)
        self._model, self._dtypes = model, dense_dtypes(model)
        for name in self.names:
            add_stand_in(model.get_submodule(name))

    def update_weight_conversions(self, weight_conversions: list) -> list:
        """Called with the rules by which tensors are about to be renamed: hold the packed linears against them."""
        require_every_tensor(self._model, self.checkpoint, self.names, weight_conversions)
        return super().update_weight_conversions(weight_conversions)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs):
        restore_dtypes(model, self._dtypes)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                remove_stand_in(module)
                module.finalize()
                module.base_fingerprint = self.base_fingerprint
        del self._model, self._dtypes
        if find_spec("peft"):
            from .. import tuner  # noqa: F401 (PEFT, and so TRL, then puts our adapters on this model)
        return model

    def _lift_guard(self, config):
        """Take out of the model's config what keeps a merged checkpoint from loading where this package is not."""
        if self.quantization_config.quant_method == MERGED_METHOD and hasattr(config, WEIGHTS_KEY):
            delattr(config, WEIGHTS_KEY)
        return config

    # The hooks that see the config before transformers looks for the weights: the first up to 5.20, the second since
    # (read in 5.14 to 5.24, run in 5.16, 5.19 and 5.23). Nothing of what they are there for applies to packed linears.
    update_tp_plan = update_attn_implementation = _lift_guard

    def base_fingerprint(self, like: str | None = None) -> str:
        """Fingerprint of the base this model was loaded from, of the kind that ``like`` is.

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
        kind = (like or "").partition(":")[0]
        if kind not in self._fingerprints:
            self._fingerprints[kind] = fingerprint(self.checkpoint, like)
        return self._fingerprints[kind]

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        return {}

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
        kwargs: passed to ``from_pretrained`` of the model's Auto class (``dtype``, ``device_map`` …); ``model_class``
            names another class than the config does, as :func:`load_model` takes it.

    Raises:
        QALoraError: not a usable GPTQ base; the message says why.
    """
    from transformers import AutoConfig  # not at import: vLLM's environment imports this package too

    folder = resolve(path, revision, **{key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs})
    require_base(Checkpoint.open(folder))
    if overrides := config_overrides(folder):
        config = kwargs.get("config") or AutoConfig.from_pretrained(folder)
        config.update(overrides)
        kwargs["config"] = config
    with gptq_loads_trainable():
        model = load_model(folder, **kwargs)
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
        options = {key: kwargs[key] for key in (*_HUB_OPTIONS, "trust_remote_code") if key in kwargs}
        config = AutoConfig.from_pretrained(config or folder, **options)
    return _auto_class(config, model_class).from_pretrained(folder, **kwargs)


def _auto_class(config: "PretrainedConfig", model_class: str | None) -> type:
    """The Auto class that makes ``model_class``, else the config's own architecture, else any model of its type."""
    from transformers.models.auto import modeling_auto as auto

    classes = (auto.AutoModelForCausalLM, auto.AutoModelForImageTextToText, auto.AutoModelForMultimodalLM)
    remote = getattr(config, "auto_map", None) or {}
    made = {}
    for cls in classes:
        if cls.__name__ in remote:
            return cls
        if type(config) in cls._model_mapping:
            models = cls._model_mapping[type(config)]
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


def _folder(checkpoint_files: list[str]) -> Path:
    """The model folder of transformers' resolved shard paths (in the Hub cache, links inside a snapshot folder)."""
    return Path(checkpoint_files[0]).parent


register()  # on import: see qalora_plugin.registration
