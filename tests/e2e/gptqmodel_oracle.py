"""Runs in the serving environment: quantise with `qalora quantize`, then say what GPTQModel itself makes of the result.

    python gptqmodel_oracle.py MODEL TEXT OUT '{"sym": …, …}'

Writes the base to OUT, GPTQModel's own dequantised weights ``[K, N]`` (in float16) to OUT.dense.safetensors, and its
logits of some tokens to OUT.logits.safetensors.
"""

import json
import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file

from qalora_plugin.methods.quantizing import quantize

model, text, out, options = sys.argv[1:]
quantize(model, out, text, samples=16, length=64, **json.loads(options))
loaded = GPTQModel.load(out, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
dense = {
    name: module.dequantize_weight().float().contiguous()
    for name, module in loaded.model.named_modules()
    if hasattr(module, "dequantize_weight")
}
assert dense, "GPTQModel loaded no quantised linear"
tokens = torch.arange(4, 68).view(2, 32)
with torch.no_grad():
    save_file(dense, f"{out}.dense.safetensors")
    logits = loaded.model(input_ids=tokens, use_cache=False).logits.float().contiguous()
    save_file({"tokens": tokens, "logits": logits}, f"{out}.logits.safetensors")
