"""Bases with quantized experts, copied and changed, and adapters on them."""

import json
import shutil

import torch
from safetensors.torch import save_file

from qalora_plugin import add_adapter


def save_random(model, folder, **lora):
    """An adapter on ``model``, of random factors."""
    model = add_adapter(model, **{"r": 4, "target_modules": "all-linear", **lora})
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder)
    return folder


def copied(source, folder, tensors, weights="model.safetensors", **quantization):
    """A base with other tensors, or other settings."""
    shutil.copytree(source, folder)
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    if quantization:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= quantization
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def loss_and_gradients(model, ids):
    """The loss of a model on ``ids`` and the gradient of every parameter that trains."""
    loss = model(ids, labels=ids).loss
    return loss, *torch.autograd.grad(loss, [parameter for parameter in model.parameters() if parameter.requires_grad])
