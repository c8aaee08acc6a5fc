"""What Axolotl's config can be checked for before any long work: keys, base, and the place where the merge will go."""

import logging
from pathlib import Path
from typing import Any

import torch

from .args import refuse_unmergeable
from .atomic import require_absent
from .errors import QALoraError, os_errors_in_one_line
from .kernels.dequant import emulates
from .quant.checkpoint import Checkpoint, read_json
from .quant.modules import check_values, require_base

LOG = logging.getLogger("axolotl.qalora")


@os_errors_in_one_line()
def check_axolotl(cfg: dict[str, Any]) -> None:
    """Check a raw Axolotl config: the keys and the base.

    Raises:
        QALoraError: with what was found, what was expected and what to do.
    """
    refuse_unmergeable(cfg)
    head_is_quantised = check_base(cfg["base_model"], cfg.get("revision_of_model"))
    fused_loss = _fused_loss(cfg)
    if head_is_quantised and fused_loss:
        raise QALoraError(
            f"{fused_loss} multiplies by lm_head's dense weight itself, but {cfg['base_model']} quantises lm_head. "
            f"Set {fused_loss}: false, or use a base whose lm_head is dense (GPTQ's default)."
        )
    if cfg.get("bf16") is True and not torch.accelerator.is_available() and emulates(torch.bfloat16):
        LOG.warning(
            "bf16: true, but this CPU only emulates bfloat16, up to 75 times slower than float32. Set bf16: false."
        )


def _fused_loss(cfg: dict[str, Any]) -> str | None:
    """The key of a loss that includes lm_head: Axolotl's Liger and CCE plugins have one, CCE's is on unless said."""
    plugins = " ".join(cfg.get("plugins") or ())
    if ".liger." in plugins and cfg.get("liger_fused_linear_cross_entropy"):
        return "liger_fused_linear_cross_entropy"
    return "cut_cross_entropy" if ".cut_cross_entropy." in plugins and cfg.get("cut_cross_entropy", True) else None


def check_merge_dir(cfg: Any) -> None:
    """Before training: refuse to train towards a merge whose place is taken."""
    if cfg.qalora.merge:
        require_absent(
            merge_dir(cfg),
            "It is where this run's merge would go: remove it, set qalora.merge_dir, or set qalora.merge: false.",
        )


def merge_dir(cfg: Any) -> Path:
    """Where the merge at the end of training goes."""
    return Path(cfg.qalora.merge_dir or Path(cfg.output_dir) / "merged")


def check_base(base: str, revision: str | None = None) -> bool:
    """A local base in full (headers, shapes, scales); of a Hub id only ``config.json``, without its weights.

    Returns:
        Whether its ``lm_head`` is quantised.
    """
    if Path(base).expanduser().exists() or base.startswith(("/", ".", "~")):
        checkpoint = Checkpoint.open(base)
        modules = require_base(checkpoint)
        check_values(checkpoint, modules)
        return any(name.split(".")[-1] == "lm_head" for name in modules)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = Path(hf_hub_download(base, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise QALoraError(
            f"base_model {base!r} is no local folder, and its config.json cannot be had from the Hub: {error}. "
            "Check the spelling, your connection, and access rights."
        ) from error
    quantization = read_json(config).get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method != "gptq":
        raise QALoraError(
            f"base_model {base} has quant_method {method!r}, expected 'gptq'. "
            "Choose a GPTQ checkpoint, or make one: qalora quantize MODEL OUT."
        )
    return bool(quantization.get("lm_head"))
