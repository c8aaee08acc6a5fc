"""Runs in the serving environment: what GPTQModel itself makes of GPTQ folders.

    python gptqmodel_dense.py FOLDER OUT [FOLDER OUT …]

Writes GPTQModel's dequantized weights ``[K, N]`` of each FOLDER, in float16, to its OUT.
"""

import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file

for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    loaded = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    with torch.no_grad():
        dense = {
            name: module.dequantize_weight().half().contiguous()
            for name, module in loaded.model.named_modules()
            if hasattr(module, "dequantize_weight")
        }
    assert dense, "GPTQModel loaded no quantized linear"
    save_file(dense, out)
