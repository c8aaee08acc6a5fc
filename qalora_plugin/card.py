"""The README.md of a merged checkpoint."""

from .adapter_folder import AdapterFolder


def model_card(name: str, quantization: dict, adapter: AdapterFolder, new_bytes: int, base_bytes: int) -> str:
    """Model card in Hugging Face form: what it was made of, how exact it is, how to use it."""
    return f"""---
base_model: {quantization["base_model"]}
library_name: transformers
tags: [qalora, gptq, {quantization["bits"]}-bit]
---

# {name}

A QA-LoRA fine-tune merged into its {quantization["bits"]}-bit GPTQ base without re-quantising anything: the base's
tensors are unchanged, byte for byte, and the adapter is {len(adapter.modules)} tensors of group-wise offsets.

    w' = scales · (q − zeros) + offsets

| | |
|---|---|
| base | `{quantization["base_model"]}` (`{quantization["base_fingerprint"]}`) |
| adapter | rank {adapter.config["r"]}, alpha {adapter.config["lora_alpha"]} (`{adapter.digest()}`) |
| bits · group size · symmetric · act-order | {quantization["bits"]} · {quantization.get("group_size")} · \
{quantization["sym"]} · {quantization["desc_act"]} |
| added | {new_bytes / 1e6:.1f} MB of {quantization["offset_dtype"]} offsets on {base_bytes / 1e6:.1f} MB |
| exactness | the offsets are the adapter's own, rounded once to {quantization["offset_dtype"]}; \
`qalora verify` measures it |

## Use

    vllm serve {name}          # with the qalora package in vLLM's environment; no flag

    import qalora_plugin       # transformers
    model = AutoModelForCausalLM.from_pretrained("{name}")
"""
