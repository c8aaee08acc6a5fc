"""GPTQ as ``qalora quantize`` does it, in a process of its own, for the environment with GPTQModel."""

import sys
from pathlib import Path

from qalora_plugin.methods.bit_allocation import Choice
from qalora_plugin.methods.quantizing import quantize

SAMPLES, LENGTH = 64, 512

if __name__ == "__main__":
    model, out, dataset, *numbers = sys.argv[1:]
    bits, group_size, clip, gptaq, mixed, limit = map(int, numbers)
    samples, length = (16, 64) if limit else (SAMPLES, LENGTH)
    same = Choice(bits, group_size).bits_per_weight
    wanted = {"budget": same} if mixed else {"bits": bits}
    options = {"group_size": group_size, "clip": bool(clip), "gptaq": bool(gptaq), "samples": samples, "length": length}
    quantize(model, Path(out), dataset, **wanted, **options)
