"""``qalora: {init: calibrated}``: what can be checked of its inputs before any work, and the start itself."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axolotl.utils.train import determine_last_checkpoint

from qalora_plugin.checkpoint.adapter_folder import CONFIG_NAME
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.hub import fetch_config, is_hub_id
from qalora_plugin.checkpoint.json_files import read_json
from qalora_plugin.checkpoint.module_names import is_expert
from qalora_plugin.core.errors import QALoraError, printable
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.eval.limits import fitting_length, model_config
from qalora_plugin.eval.tokens import load_tokenizer
from qalora_plugin.methods.calibrating import LENGTH, SAMPLES, calibrate
from qalora_plugin.methods.calibration_text import read_calibration
from qalora_plugin.methods.dense_source import require_dense

if TYPE_CHECKING:
    from peft import PeftModel

LOG = logging.getLogger("axolotl.qalora")
_AGAINST_THE_BASE = ("dpo", "ipo", "kto")


def check_init(cfg: dict[str, Any], targets: Iterable[str]) -> None:
    """Refuse a calibrated start of a run that cannot have one; of a raw config.

    Args:
        targets: the base's linears that get an adapter, by their names on disk; none where that is not known yet.

    Raises:
        QALoraError: with what was found, what was expected and what to do.
    """
    if cfg.get("lora_model_dir"):
        if not cfg.get("merge_lora"):
            LOG.info("qalora.init: not applied, for lora_model_dir has an adapter that training goes on from")
        return
    for key in ("fsdp_config", "deepspeed"):
        if cfg.get(key):
            raise QALoraError(
                f"qalora.init: calibrated needs whole layers, and {key} shares them out over ranks. Calibrate in one "
                "process first (qalora_plugin.calibrate, then save_pretrained), and set lora_model_dir to that adapter."
            )
    if cfg.get("rl") in _AGAINST_THE_BASE:
        raise QALoraError(
            f"qalora.init: calibrated with rl: {cfg['rl']}, whose reference is the base without an adapter: training "
            "would start away from it. Remove init."
        )
    if expert := next(filter(is_expert, targets), None):
        raise QALoraError(
            f"qalora.init: calibrated is for linears, but {printable(expert)} is one of a mixture of experts. Remove "
            "init, or exclude the experts (lora_exclude_modules)."
        )


def check_inputs(cfg: Any, targets: Callable[[], dict[str, GroupwiseSpec]]) -> None:
    """The 16-bit model and the text of a run that is about to start calibrated; what is merged or asked later needs
    neither.

    Args:
        targets: gives the base's linears that get an adapter, by their names on disk; ``{}`` where they are not here.

    Raises:
        QALoraError: with what was found, what was expected and what to do.
    """
    if not cfg.qalora.init or cfg.lora_model_dir or determine_last_checkpoint(cfg):
        return
    name, samples = cfg.qalora.init_model, cfg.qalora.init_samples or SAMPLES
    text = read_calibration(cfg.qalora.init_dataset, samples, LENGTH, cfg.seed or 0)
    if is_hub_id(name):
        require_dense(read_json(fetch_config(name, what="qalora.init_model")), name)
        return
    files = Checkpoint.open(name)
    require_dense(files.config, name)
    _check_sizes(files, targets(), name)
    text.sequences(load_tokenizer(files.folder), fitting_length(model_config(files.folder), LENGTH))


def _check_sizes(files: Checkpoint, targets: dict[str, GroupwiseSpec], name: str) -> None:
    stored = {target: files.tensors.get(f"{target}.weight") for target in targets}
    if not any(stored.values()):
        return  # named otherwise on disk than in the model: the names in the model are compared when it is loaded
    for target, tensor in stored.items():
        sizes = (targets[target].in_features, targets[target].out_features)
        if tensor is None or sorted(tensor.shape) != sorted(sizes):
            found = "has no weight of that name" if tensor is None else f"has {'×'.join(map(str, tensor.shape))}"
            raise QALoraError(
                f"qalora.init_model {name} is not the 16-bit model of this base: {printable(target)} is "
                f"{sizes[1]}×{sizes[0]} in the base, and {name} {found}. Give the model that the base was made from."
            )


def start_calibrated(model: "PeftModel", cfg: Any) -> None:
    """Calibrate a new adapter; what a checkpoint is about to be loaded into takes over how that began."""
    if checkpoint := determine_last_checkpoint(cfg):
        begun = (read_json(Path(checkpoint) / CONFIG_NAME).get("qalora") or {}).get("init")
        if begun:
            LOG.info("qalora.init: not applied again, for training goes on from %s", checkpoint)
        else:
            LOG.warning("qalora.init: not applied, for training goes on from %s, which began without", checkpoint)
        return
    options = cfg.qalora
    calibrate(model, options.init_model, options.init_dataset, options.init_samples or SAMPLES, LENGTH, cfg.seed or 0)
