"""GPTQ as ``qalora quantize`` does it, in a process of its own, for the environment with GPTQModel."""

import sys
from pathlib import Path

from qalora_plugin.methods.quantizing import quantize

SAMPLES, LENGTH = 64, 512

if __name__ == "__main__":
    model, out, dataset, bits, group_size, clip, gptaq, limit = sys.argv[1:]
    samples, length = (16, 64) if int(limit) else (SAMPLES, LENGTH)
    options = {"clip": bool(int(clip)), "gptaq": bool(int(gptaq))}
    quantize(model, Path(out), dataset, int(bits), int(group_size), samples=samples, length=length, **options)
