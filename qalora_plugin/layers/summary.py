"""How a model's packed linears train here: what doctor says of kinds of layers, said of a model."""

from collections import Counter

import torch

from qalora_plugin.kernels.select import training_kernel
from qalora_plugin.layers.linear import QuantLinear


def training_summary(model: torch.nn.Module, dtype: torch.dtype) -> list[str]:
    """A line for each way in which the packed linears of ``model`` train in ``dtype``, and why not a faster one."""
    ways = Counter(
        training_kernel(module.quantized, dtype) for module in model.modules() if isinstance(module, QuantLinear)
    )
    return [
        f"{count} packed linears in {dtype}: {way.kernel}"
        + (f" (not faster: {way.why_not_faster})" if way.why_not_faster else "")
        for way, count in ways.items()
    ]


def training_dtype(model: torch.nn.Module, bf16: bool, fp16: bool) -> torch.dtype:
    """What a Trainer with these flags computes in: autocast's dtype, or the model's."""
    return torch.bfloat16 if bf16 else torch.float16 if fp16 else next(model.parameters()).dtype
