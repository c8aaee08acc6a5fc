"""The README.md of a merged checkpoint."""

import json
import logging
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.hub import is_local
from qalora_plugin.checkpoint.replacing import replace_text
from qalora_plugin.conversion.strength import PICTURE_NAME
from qalora_plugin.core.errors import printable
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.qalora import NEEDS_QALORA
from qalora_plugin.formats.served_bits import SizeReport, kinds

if TYPE_CHECKING:
    from qalora_plugin.eval.verifying import VerifyReport

logger = logging.getLogger(__name__)

_EXACTNESS = "| exactness | "
_UNVERIFIED = "not measured yet: `qalora verify --base BASE --adapter ADAPTER --merged THIS_FOLDER`"


def model_card(
    name: str,
    config: dict[str, Any],
    quantization: dict[str, Any],
    adapter: AdapterFolder,
    new_bytes: int,
    base_bytes: int,
    specs: Collection[GroupwiseSpec],
    served: SizeReport,
    factored: int,
) -> str:
    """Model card in Hugging Face form: what it was made of, how exact it is, how to use it.

    The metadata names the base only by a Hub id: the Hub refuses a path there.

    Args:
        config: of the model. quantization: what stands in it, of the merge.
        specs: all quantized linears of the merge. served: what they take. factored: how many of the adapted ones have
            their offsets as factors.
    """
    stored = kinds(specs)
    sizes, grid = (
        (f"{quantization['bits']}-bit", f"{quantization['bits']} · {quantization.get('group_size')}")
        if len(stored) <= 1
        else ("mixed-bit", "; ".join(stored))
    )
    base = quantization["base_model"]
    metadata = "" if is_local(base) else f"base_model: {_yaml(base)}\n"
    also, scales, delta = "", "scales", ""
    if adapter.has_scales:
        also, scales, delta = " and as many of changes of the scales", "(scales + scales_delta)", " and scales_delta"
    if factored:
        also += f"; the offsets of {factored} are kept as two factors each"
    return f"""---
{metadata}library_name: transformers
tags: [qalora, gptq, {sizes}]
---

# {_plain(name)}

**To load or serve this model, install the `qalora` package** into the environment that does it; nothing else is needed.
transformers, and whatever is built on it, then loads this folder like any other, and vLLM serves it without a flag.
Without the package both stop: transformers at the missing file `{NEEDS_QALORA}`, vLLM at the unknown method `qalora`.

A QA-LoRA fine-tune merged into its {sizes} GPTQ base without re-quantising anything: the base's
tensors are unchanged, byte for byte, and the adapter is {len(adapter.modules)} tensors of group-wise offsets{also}.

    w' = {scales} · (q − zeros) + offsets

| | |
|---|---|
| base | {_code(base)} (`{quantization["base_fingerprint"]}`) |
| adapter | rank {adapter.config["r"]}, alpha {adapter.config["lora_alpha"]} (`{quantization["adapter"]}`) |
| bits · group size · symmetric · act-order | {grid} · {quantization["sym"]} · {quantization["desc_act"]} |
| served bits | {served} |
| added | {new_bytes / 1e6:.1f} MB of {quantization["offset_dtype"]} offsets{delta} on {base_bytes / 1e6:.1f} MB |
{_EXACTNESS}{_UNVERIFIED} |

![how much the adapter changes each linear, by layer]({PICTURE_NAME})

Means over a sample of each linear's weights: what its offsets move a weight by, in steps of the quantized grid\
{", and by which part its steps change" if adapter.has_scales else ""}.

## Use

    vllm serve {shlex.quote(_plain(name))}

    model = {auto_class_name(config)}.from_pretrained("{_plain(name)}")     # transformers
"""


def auto_class_name(config: dict[str, Any]) -> str:
    """The class of transformers with which a model is loaded: not all that see are among those of text alone."""
    architecture = str((config.get("architectures") or [""])[0])
    sees = "vision_config" in config and architecture.endswith("ForConditionalGeneration")
    return "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"


def add_exactness(folder: Path, report: "VerifyReport") -> None:
    """Put the figures of a verification into the card of a merged checkpoint, in place of an earlier one's.

    A card that somebody has rewritten, or a folder that cannot be written, stays as it is; a warning says so.
    """
    verdict = "verified" if report.passed else f"**FAILED** ({'; '.join(report.failures)})"
    figures = (
        f"{verdict}: {report.tensors_identical} of {report.tensors} base tensors byte-identical; offsets within "
        f"{report.offset_error:.3g} of their rounding to {report.offset_dtype}, {report.weight_error_relative:.2g} of "
        f"the adapter in all; over {report.tokens} tokens in {report.dtype}, logits differ by {report.logit_error:.2g} "
        f"where nothing is rounded, and rounding moves them by ≤ {report.logit_difference:.2g} (KL "
        f"{report.kl_mean:.2g} nats, top-1 agreement {report.top1_agreement:.2%})"
    )
    card = folder / "README.md"
    try:
        lines = card.read_text(encoding="utf-8").split("\n") if card.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("the figures cannot be written into %s: %s", card, error)
        return
    found = [i for i, line in enumerate(lines) if line.startswith(_EXACTNESS)]
    if len(found) != 1:
        logger.warning("%s has no line for the exactness of the merge: it stays as it is", card)
        return
    lines[found[0]] = f"{_EXACTNESS}{figures} |"
    try:
        replace_text(card, "\n".join(lines), mode=card.stat().st_mode & 0o666)
    except OSError as error:
        logger.warning("the figures cannot be written into %s: %s", card, error.strerror)


def _yaml(text: str) -> str:
    """As a value of the front matter, whatever it says: YAML reads JSON's strings."""
    return json.dumps(text)


def _plain(text: Any) -> str:
    """In a line of Markdown: no line breaks, and nothing that a terminal or a browser would obey."""
    return printable(text).replace("\n", " ").replace("<", "‹").replace(">", "›")


def _code(text: Any) -> str:
    """As code in a table."""
    safe = _plain(text).translate({ord("`"): "'", ord("|"): "¦"})
    return f"`{safe}`"
