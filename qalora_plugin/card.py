"""The README.md of a merged checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from .adapter_folder import AdapterFolder
from .quant.checkpoint import is_local

if TYPE_CHECKING:
    from .verifying import VerifyReport

_UNVERIFIED = "not measured yet: run `qalora verify`"


def model_card(name: str, quantization: dict, adapter: AdapterFolder, new_bytes: int, base_bytes: int) -> str:
    """Model card in Hugging Face form: what it was made of, how exact it is, how to use it.

    The metadata names the base only by a Hub id: the Hub refuses a path there.
    """
    base = quantization["base_model"]
    metadata = "" if is_local(base) else f"base_model: {base}\n"
    return f"""---
{metadata}library_name: transformers
tags: [qalora, gptq, {quantization["bits"]}-bit]
---

# {name}

A QA-LoRA fine-tune merged into its {quantization["bits"]}-bit GPTQ base without re-quantising anything: the base's
tensors are unchanged, byte for byte, and the adapter is {len(adapter.modules)} tensors of group-wise offsets.

    w' = scales · (q − zeros) + offsets

| | |
|---|---|
| base | `{base}` (`{quantization["base_fingerprint"]}`) |
| adapter | rank {adapter.config["r"]}, alpha {adapter.config["lora_alpha"]} (`{quantization["adapter"]}`) |
| bits · group size · symmetric · act-order | {quantization["bits"]} · {quantization.get("group_size")} · \
{quantization["sym"]} · {quantization["desc_act"]} |
| added | {new_bytes / 1e6:.1f} MB of {quantization["offset_dtype"]} offsets on {base_bytes / 1e6:.1f} MB |
| exactness | {_UNVERIFIED} |

## Use

    vllm serve {name}          # with the qalora package in vLLM's environment; no flag

    import qalora_plugin       # transformers
    model = AutoModelForCausalLM.from_pretrained("{name}")
"""


def add_exactness(folder: Path, report: "VerifyReport") -> None:
    """Put the figures of a verification into the card of the merged checkpoint in ``folder``."""
    figures = (
        f"{report.tensors_identical} of {report.tensors} base tensors byte-identical; weight error "
        f"{report.weight_error_relative:.2g} of the adapter; over {report.tokens} tokens in {report.dtype}: relative "
        f"logit difference ≤ {report.logit_difference:.2g}, KL {report.kl_mean:.2g} nats, top-1 agreement "
        f"{report.top1_agreement:.2%}"
    )
    card, new = folder / "README.md", folder / ".README.md.new"
    new.write_text(card.read_text().replace(_UNVERIFIED, figures))
    new.rename(card)
