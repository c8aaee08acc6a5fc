"""A model's QA-LoRA layers, replaced by ``core/reference.py`` over dense weights and plain autograd."""

import copy

import torch
from torch import nn

from qalora_plugin.core import reference
from qalora_plugin.integrations.peft.adapter import QALoraLayer


class DenseReference(nn.Module):
    """``reference.adapter_linear``, summed over the named adapters; its parameters are named as the layer's are."""

    def __init__(self, layer: QALoraLayer, names: tuple[str, ...], dtype: torch.dtype):
        super().__init__()
        base = layer.base_layer
        weight = reference.dequantize(base.quantized)
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("g_idx", reference.column_groups(base.quantized))
        self.register_buffer("bias", None if base.bias is None else base.bias.to(dtype))
        self.lora_A, self.lora_B = (copy.deepcopy(side).to(dtype) for side in (layer.lora_A, layer.lora_B))
        self.names, self.scaling = names, dict(layer.scaling)

    def forward(self, x):
        """One adapter, as in training, is exactly the definition; more of them add their parts."""
        y = 0 if self.names else x @ self.weight
        for i, name in enumerate(self.names):
            weight = self.weight if i == 0 else torch.zeros_like(self.weight)
            lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
            y = y + reference.adapter_linear(x, weight, self.g_idx, lora_a, lora_b, self.scaling[name])
        return y if self.bias is None else y + self.bias


def dense_reference(model: nn.Module, names: tuple[str, ...] = ("default",), dtype: torch.dtype = torch.float32):
    """A copy of ``model``; ``names`` are the active adapters, none for the base alone."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QALoraLayer):
            model.set_submodule(name, DenseReference(layer, names, dtype))
    return model.to(dtype)
