"""A saved adapter that is loaded into one that a model has already, as when a run is resumed: of the same base, and the
same adapter. PEFT, FSDP and DeepSpeed then read its weights alone, take what fits, and leave the rest as it is."""

import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.integrations import PeftAdapterMixin

from qalora_plugin.checkpoint.adapter_config import (
    Ratios,
    check_config,
    check_config_patterns,
    check_pooling,
    rank_of,
    require_base,
    scaling_of,
)
from qalora_plugin.checkpoint.adapter_folder import CONFIG_NAME, AdapterFolder
from qalora_plugin.checkpoint.hub import is_local
from qalora_plugin.checkpoint.json_files import read_json
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraConfig, QALoraLayer
from qalora_plugin.layers.linear import QuantLinear

_OTHERS = {kind.value for kind in PeftType} - {PeftType.LORA.value}  # prompts, norms …: nothing of ours
_END = "Resume with the settings it began with, or begin anew."
_MAIN = "default"  # the adapter that PEFT saves into a folder itself
_STATE = "trainer_state.json"
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _check_base_first(load: Callable) -> Callable:
    """PEFT's ``load_adapter``, of a folder that is whole and belongs to the base.

    PEFT would leave what the folder lacks as a new adapter has it. And where a training run is resumed the model has
    the adapter already, bound to the base that was loaded; PEFT then reads the checkpoint's weights alone, and not the
    config that names the base they were trained on.
    """

    @wraps(load)
    def load_adapter(self: PeftModel, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        folder = Path(model_id, kwargs.get("subfolder") or "")
        if is_local(folder):
            _require_fitting(self, folder, adapter_name)
        found = load(self, model_id, adapter_name, *args, **kwargs)
        if folder.name == adapter_name and _is_left_out(self, folder.parent):
            load_adapter(self, folder.parent, _MAIN, is_trainable=True)
        return found

    return load_adapter


def _is_left_out(model: PeftModel, checkpoint: Path) -> bool:
    """Whether a training run is resumed that has two adapters: transformers (``Trainer._load_from_checkpoint``, 5.19)
    then loads those of subfolders alone, as TRL's ``ref``, and not the one that is trained, which lies beside them."""
    is_resumed = (checkpoint / _STATE).is_file() and (checkpoint / CONFIG_NAME).is_file()
    return is_resumed and isinstance(model.peft_config.get(_MAIN), QALoraConfig)


def unwrapped(name: str) -> str:
    """A module's name before FSDP checkpointed activations, or torch compiled it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def require_same_run(model: PeftModel, checkpoint: Path, weights: bool) -> None:
    """Refuse a checkpoint of FSDP or DeepSpeed that is of another base, or of another adapter than is trained.

    Args:
        weights: of ``adapter_model.safetensors`` are what will be loaded; else the engine's own, which only the config
            beside them tells of.

    Raises:
        QALoraError: what the checkpoint was trained with, and what this run has.
    """
    adapter_name = str(model.active_adapter)
    if weights:
        _require_fitting(model, checkpoint, adapter_name)
        return
    if not (checkpoint / CONFIG_NAME).is_file():
        raise QALoraError(
            f"{checkpoint} has no {CONFIG_NAME}, so nothing says what it was trained with. Put that of its run there "
            "(from the run's output folder), or begin anew."
        )
    saved = read_json(checkpoint / CONFIG_NAME)
    check_config(saved, checkpoint / CONFIG_NAME)
    check_pooling(saved.get("qalora") or {}, str(checkpoint))
    _require_base(model, saved, checkpoint)
    names = [
        unwrapped(name).removesuffix(".base_layer")
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, QuantLinear)
    ]
    check_config_patterns(saved, names, checkpoint / CONFIG_NAME)
    targets: dict[str, Any] = {field: saved.get(field) for field in _TARGETS}
    config = LoraConfig(**targets)
    trained = {
        name: (rank_of(saved, name), scaling_of(saved, name))
        for name in names
        if check_target_module_exists(config, name)
    }
    _require_same_adapter(model, adapter_name, checkpoint, saved, trained)


def _require_fitting(model: PeftModel, folder: Path, adapter_name: str) -> None:
    """Of an adapter as PEFT saves it: the base's, whole, and if the model has one of that name, such a one."""
    if (saved := _whole(model, model.get_base_model(), folder)) is None:
        return
    trained = {name: (saved.rank(stored), saved.scaling(stored)) for stored, name in saved.keys.items()}
    if isinstance(model.peft_config.get(adapter_name), QALoraConfig):
        _require_same_adapter(model, adapter_name, folder, saved.config, trained)


def _whole(model: nn.Module, base_model: Any, folder: Path) -> AdapterFolder | None:
    """An adapter of the base that was loaded, nothing of it missing; None where there is no such base, or it is of a
    kind of PEFT's own."""
    layer = next((module for module in model.modules() if isinstance(module, QuantLinear)), None)
    if layer is None or not layer.base_fingerprint:
        return None
    if (folder / CONFIG_NAME).is_file() and read_json(folder / CONFIG_NAME).get("peft_type") in _OTHERS:
        return None
    saved = AdapterFolder.open(folder)
    _require_base(model, saved.config, folder)
    saved.check_fits(base_model.hf_quantizer.opened.specs)
    saved.check_values()
    return saved


def _require_base(model: nn.Module, saved: dict[str, Any], folder: Path) -> None:
    layer = next(module for module in model.modules() if isinstance(module, QuantLinear))
    if layer.base_fingerprint:
        found = layer.base_fingerprint(saved["qalora"].get("base_fingerprint"))
        require_base(saved, folder, found, "the base that was loaded")


def _require_same_adapter(
    model: PeftModel, adapter_name: str, folder: Path, saved: dict[str, Any], trained: dict[str, tuple[int, float]]
) -> None:
    """Refuse a checkpoint of other linears, or of other ranks or alphas, or whose numbers are in other units. How it
    began, calibrated or not, is how the adapter that it is loaded into began.

    Args:
        saved: its config. trained: linear, by its name in the model → rank and alpha/rank.
    """
    config: Any = model.peft_config[adapter_name]
    wanted, found = (
        f"with scales, scales_lr_ratio {ratios.scales:g} (offsets' {ratios.offsets:g})"
        if settings.get("scales")
        else "without scales"
        for settings, ratios in ((one, Ratios.of(one)) for one in (config.qalora or {}, saved["qalora"]))
    )
    if wanted != found:
        raise QALoraError(f"{folder} was trained {found}, this run trains {wanted}. {_END}")
    shared = (bool(one.get("shared_a")) for one in (vars(config), saved))
    if len(set(shared)) > 1:
        raise QALoraError(
            f"{folder} was trained with shared_a: {bool(saved.get('shared_a'))}, this run has another. {_END}"
        )
    layers = {
        unwrapped(name): layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, QALoraLayer) and adapter_name in layer.lora_A
    }
    if different := sorted(layers.keys() ^ trained.keys()):
        raise QALoraError(
            f"{folder} adapts {len(trained)} linears, this run {len(layers)}; {different[0]} differs. {_END}"
        )
    for name, (rank, scaling) in trained.items():
        here = layers[name].r[adapter_name], layers[name].scaling[adapter_name]
        if rank != here[0] or not math.isclose(scaling, here[1]):
            raise QALoraError(
                f"{folder} trained {name} at rank {rank} and alpha/rank {scaling:g}, this run has rank {here[0]} and "
                f"{here[1]:g}. {_END}"
            )
    config.qalora.pop("init", None)
    if begun := saved["qalora"].get("init"):
        config.qalora["init"] = begun


def _check_whole_first(load: Callable) -> Callable:
    """transformers' own ``model.load_adapter``, likewise."""

    @wraps(load)
    def load_adapter(self: Any, peft_model_id: str | Path | None = None, *args: Any, **kwargs: Any) -> Any:
        if peft_model_id is not None and is_local(peft_model_id):
            options = kwargs.get("adapter_kwargs") or {}
            _whole(self, self, Path(peft_model_id, options.get("subfolder") or ""))
        return load(self, peft_model_id, *args, **kwargs)

    return load_adapter


PeftAdapterMixin.load_adapter = _check_whole_first(PeftAdapterMixin.load_adapter)  # type: ignore[method-assign]
PeftModel.load_adapter = _check_base_first(PeftModel.load_adapter)  # type: ignore[method-assign]  # on purpose
