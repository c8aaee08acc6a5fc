"""What Axolotl's config can be checked for before any long work: keys, base, and the place where the merge will go."""

from pathlib import Path
from typing import Any

from .args import refuse_unmergeable
from .atomic import require_absent
from .errors import QALoraError
from .quant.checkpoint import Checkpoint, read_json
from .quant.modules import check_values, require_base


def check_axolotl(cfg: dict[str, Any]) -> None:
    """Check a raw Axolotl config: the keys and the base.

    Raises:
        QALoraError: with what was found, what was expected and what to do.
    """
    refuse_unmergeable(cfg)
    check_base(cfg["base_model"], cfg.get("revision_of_model"))


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


def check_base(base: str, revision: str | None = None) -> None:
    """A local base in full (headers, shapes, scales); of a Hub id only ``config.json``, without its weights."""
    if Path(base).expanduser().exists() or base.startswith(("/", ".", "~")):
        checkpoint = Checkpoint.open(base)
        check_values(checkpoint, require_base(checkpoint))
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = Path(hf_hub_download(base, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise QALoraError(
            f"base_model {base!r} is no local folder, and its config.json cannot be had from the Hub: {error}. "
            "Check the spelling, your connection, and access rights."
        ) from error
    method = (read_json(config).get("quantization_config") or {}).get("quant_method")
    if method != "gptq":
        raise QALoraError(
            f"base_model {base} has quant_method {method!r}, expected 'gptq'. "
            "Choose a GPTQ checkpoint, or make one: qalora quantize MODEL OUT."
        )
