"""Quantised linears as a checkpoint stores them, vLLM's config for them, and what the reference makes of them."""

import torch
from safetensors.torch import save_file
from support.fabricate import quantise
from support.layers import read_stored

from qalora_plugin.core import reference
from vllm_ext.config import QALoraConfig

K = 256
# Relative to the result's norm. bfloat16: rounding of scales, of the kernel's weights, of y; 2⁻⁹ each.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def linear_tensors(n, seed, sym, checkpoint_format, group_size, bits=4, order_seed=None, offset_dtype=torch.float16):
    """A random quantised linear ``[K, N]`` as a checkpoint stores it. ``offset_dtype`` None: not adapted."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, K, generator=generator) * 0.05
    order = None if order_seed is None else torch.Generator().manual_seed(order_seed)
    tensors = quantise(weight, bits, group_size, sym, checkpoint_format, order is not None, order)
    if offset_dtype is not None:
        shift = 0.5 * torch.randn(tensors["scales"].shape, generator=generator)
        tensors["offsets"] = (tensors["scales"].float() * shift).to(offset_dtype)
    tensors["bias"] = torch.randn(n, generator=generator)
    return tensors


def expected(x, tensors, checkpoint_format, bits=4):
    """float64, from the stored tensors."""
    weight = reference.dequantize(read_stored(tensors, bits, checkpoint_format))
    return x.double() @ weight + tensors["bias"].double()


def config_for(folder, modules, checkpoint_format, path=None):
    """The vLLM config of a checkpoint that holds ``modules``; ``path``: the serving path to force."""
    stored = {f"{name}.{part}": tensor for name, tensors in modules.items() for part, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    method = "qalora" if any(name.endswith(".offsets") for name in stored) else "gptq"
    quantization = {"quant_method": method, "checkpoint_format": checkpoint_format, "format_version": 1}
    if path:
        quantization["serving_path"] = path
    config = QALoraConfig.from_config(quantization)
    config.maybe_update_config(str(folder))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def load(layer, tensors, *shard):
    """What a vLLM model's ``load_weights`` does, then the step after loading."""
    parameters = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].weight_loader(parameters[name], tensor, *shard)


def assert_close(found, wanted):
    assert (found - wanted).norm() <= TOLERANCE[found.dtype] * wanted.norm()
