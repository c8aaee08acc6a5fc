"""``qalora: {init: calibrated}``: what can be checked of its inputs before any work, and the start itself."""

import logging
import re
from typing import TYPE_CHECKING, Any

from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.hub import expanded, fetch_config, is_local
from qalora_plugin.checkpoint.json_files import read_json
from qalora_plugin.core.errors import QALoraError, printable
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.eval.tokens import is_text_file, read_texts
from qalora_plugin.integrations.axolotl.args import QALoraBlock
from qalora_plugin.methods.calibrating import (
    CALIBRATED,
    LENGTH,
    SAMPLES,
    calibrate,
    calibration_sequences,
    require_dense,
)

if TYPE_CHECKING:
    from peft import PeftModel

LOG = logging.getLogger("axolotl.qalora")
_AGAINST_THE_BASE = ("dpo", "ipo", "kto")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def check_init(cfg: dict[str, Any], options: QALoraBlock, targets: dict[str, GroupwiseSpec]) -> None:
    """Refuse a calibrated start that cannot be made; of a raw config.

    Args:
        targets: the base's linears that get an adapter, by their names on disk; ``{}`` where that is not known yet.

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
    if expert := next((name for name in targets if _EXPERT.search(name)), None):
        raise QALoraError(
            f"qalora.init: calibrated is for linears, but {printable(expert)} is one of a mixture of experts. Remove "
            "init, or exclude the experts (lora_exclude_modules)."
        )
    _check_model(str(options.init_model), targets)
    dataset = str(options.init_dataset)
    if is_text_file(dataset) and is_local(str(options.init_model)):
        samples, seed = options.init_samples or SAMPLES, cfg.get("seed") or 0
        calibration_sequences(expanded(str(options.init_model)), dataset, samples, LENGTH, seed)
    elif is_text_file(dataset):
        read_texts(dataset)


def _check_model(name: str, targets: dict[str, GroupwiseSpec]) -> None:
    """A local one by its headers, one on the Hub by its config."""
    if not (is_local(name) or expanded(name).exists() or name.startswith(("/", ".", "~"))):
        require_dense(read_json(fetch_config(name, what="qalora.init_model")), name)
        return
    files = Checkpoint.open(name)
    require_dense(files.config, name)
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
    """Calibrate a new adapter; one that a checkpoint is about to be loaded into only says that it was."""
    from axolotl.utils.train import determine_last_checkpoint

    if checkpoint := determine_last_checkpoint(cfg):
        LOG.info("qalora.init: not applied again, for training goes on from %s", checkpoint)
        config: Any = model.peft_config[model.active_adapter]
        config.qalora["init"] = CALIBRATED
        return
    options = cfg.qalora
    calibrate(model, options.init_model, options.init_dataset, options.init_samples or SAMPLES, LENGTH, cfg.seed or 0)
