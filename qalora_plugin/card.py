"""The README.md of a merged checkpoint."""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter_folder import AdapterFolder
from .errors import printable
from .quant.checkpoint import is_local

if TYPE_CHECKING:
    from .verifying import VerifyReport

_UNVERIFIED = "not measured yet: run `qalora verify`"


def model_card(name: str, quantization: dict, adapter: AdapterFolder, new_bytes: int, base_bytes: int) -> str:
    """Model card in Hugging Face form: what it was made of, how exact it is, how to use it.

    The metadata names the base only by a Hub id: the Hub refuses a path there.
    """
    base = quantization["base_model"]
    metadata = "" if is_local(base) else f"base_model: {_yaml(base)}\n"
    return f"""---
{metadata}library_name: transformers
tags: [qalora, gptq, {quantization["bits"]}-bit]
---

# {_plain(name)}

A QA-LoRA fine-tune merged into its {quantization["bits"]}-bit GPTQ base without re-quantising anything: the base's
tensors are unchanged, byte for byte, and the adapter is {len(adapter.modules)} tensors of group-wise offsets.

    w' = scales · (q − zeros) + offsets

| | |
|---|---|
| base | {_code(base)} (`{quantization["base_fingerprint"]}`) |
| adapter | rank {adapter.config["r"]}, alpha {adapter.config["lora_alpha"]} (`{quantization["adapter"]}`) |
| bits · group size · symmetric · act-order | {quantization["bits"]} · {quantization.get("group_size")} · \
{quantization["sym"]} · {quantization["desc_act"]} |
| added | {new_bytes / 1e6:.1f} MB of {quantization["offset_dtype"]} offsets on {base_bytes / 1e6:.1f} MB |
| exactness | {_UNVERIFIED} |

## Use

    vllm serve {_plain(name)}          # with the qalora package in vLLM's environment; no flag

    import qalora_plugin       # transformers
    model = AutoModelForCausalLM.from_pretrained("{_plain(name)}")
"""


def add_exactness(folder: Path, report: "VerifyReport") -> None:
    """Put the figures of a verification into the card of the merged checkpoint in ``folder``."""
    figures = (
        f"{report.tensors_identical} of {report.tensors} base tensors byte-identical; weight error "
        f"{report.weight_error_relative:.2g} of the adapter; over {report.tokens} tokens in {report.dtype}: relative "
        f"logit difference ≤ {report.logit_difference:.2g}, KL {report.kl_mean:.2g} nats, top-1 agreement "
        f"{report.top1_agreement:.2%}"
    )
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").replace(_UNVERIFIED, figures)
    handle, new = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        os.fchmod(handle, card.stat().st_mode & 0o666)
    os.replace(new, card)


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
