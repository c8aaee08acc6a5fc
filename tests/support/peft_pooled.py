"""Adapters as PEFT's ``use_qalora`` trains and saves them, by PEFT itself: its layers over dense twins of a base."""

import peft
import torch
from peft.tuners.lora.gptq import GPTQLoraLinear

from qalora_plugin import load_base
from qalora_plugin.layers.linear import QuantLinear


class DenseTwin(torch.nn.Linear):
    """A dense linear of a quantized one; PEFT puts on it what it puts on GPTQModel's."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight.data = layer.dense_weight().t().contiguous()
        if layer.bias is not None:
            self.bias.data = layer.bias.float()


def dense_twin(base):
    """The model of ``base``, in float32, nothing of ours in it."""
    model = load_base(base, dtype=torch.float32)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            model.set_submodule(name, DenseTwin(layer))
    return model


def make_peft_qalora(base, folder, group_size=32, std=0.05, **lora):
    """Save a random ``use_qalora`` adapter; returns PEFT's model of it."""
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        **lora,
    }
    config = peft.LoraConfig(use_qalora=True, qalora_group_size=group_size, task_type="CAUSAL_LM", **settings)
    config._register_custom_module({DenseTwin: GPTQLoraLinear})
    model = peft.get_peft_model(dense_twin(base), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, std, generator=generator)
    model.save_pretrained(folder)
    return model.eval()
