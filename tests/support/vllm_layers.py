"""Quantised linears as a checkpoint stores them, vLLM's config for them, and what the reference makes of them."""

from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from support.fabricate import quantize
from support.layers import read_stored
from vllm.model_executor.layers.linear import QKVParallelLinear

from qalora_plugin.core import reference
from qalora_plugin.core.packing import unpack_rows
from qalora_plugin.formats.qalora import MERGED_PARTS
from vllm_ext.config import QALoraConfig

K = 256
HEAD, HEADS, KV_HEADS = 64, 4, 2
SIZES = {"q": HEAD * HEADS, "k": HEAD * KV_HEADS, "v": HEAD * KV_HEADS}
# Relative to the result's norm. bfloat16: rounding of scales, of the kernel's weights, of y; 2⁻⁹ each.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def linear_tensors(
    n, seed, sym, checkpoint_format, group_size, bits=4, order_seed=None, offset_dtype=torch.float16, scales_dtype=None,
    rank=0,
):  # fmt: skip
    """A random quantised linear ``[K, N]`` as a checkpoint stores it.

    Args:
        offset_dtype: None: not adapted. scales_dtype: of the changes of its scales; None: none.
        rank: of the offsets' factors; 0: they are dense.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, K, generator=generator) * 0.05
    order = None if order_seed is None else torch.Generator().manual_seed(order_seed)
    tensors = quantize(weight, bits, group_size, sym, checkpoint_format, order is not None, order)
    if offset_dtype is not None:
        shift = 0.5 * torch.randn(tensors["scales"].shape, generator=generator)
        step = tensors["scales"].float()
        if rank:
            tensors["offsets_a"] = 0.5 * step.mean() * torch.randn(len(step), rank, generator=generator) / rank**0.5
            tensors["offsets_b"] = torch.randn(rank, n, generator=generator).to(offset_dtype)
        else:
            tensors["offsets"] = (step * shift).to(offset_dtype)
    if scales_dtype is not None:
        change = 0.2 * torch.randn(tensors["scales"].shape, generator=generator)
        tensors["scales_delta"] = (tensors["scales"].float() * change).to(scales_dtype)
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
    method = "qalora" if any(name.endswith(MERGED_PARTS) for name in stored) else "gptq"
    quantization = {"quant_method": method, "checkpoint_format": checkpoint_format, "format_version": 1}
    if any(name.endswith(".scales_delta") for name in stored):
        quantization["format_version"] = 2
    if any(name.endswith(".offsets_a") for name in stored):
        quantization["format_version"] = 3
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


def run_qkv(folder, parts, checkpoint_format, dtype, bits=4, path=None):
    """The fused layer's output and the reference's, for one random input."""
    modules = {f"attn.{part}_proj": tensors for part, tensors in parts.items()}
    config = config_for(folder, modules, checkpoint_format, path)
    layer = QKVParallelLinear(
        K, HEAD, HEADS, KV_HEADS, bias=True, params_dtype=dtype, quant_config=config, prefix="attn.qkv_proj"
    )
    for part, tensors in parts.items():
        load(layer, tensors, part)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(9)).to(dtype)
    y = torch.cat([expected(x, tensors, checkpoint_format, bits) for tensors in parts.values()], dim=-1)
    return layer, layer(x)[0], y


# The dtype that layers compute in, and the path forced for it.
COMPUTE = [
    (torch.bfloat16, None),
    (torch.bfloat16, "kernel+offsets"),
    (torch.float16, None),
    (torch.bfloat16, "dense"),
    (torch.float32, "dense"),
]


class KernelWithoutZeros:
    """In the place of a kernel of vLLM's that takes every zero-point as ``2^(b−1)``, as Marlin does with 8 bits."""

    def __init__(self, bits, act_type):
        self.bits, self.config = bits, SimpleNamespace(zero_points=False, act_type=act_type)

    def process_weights_after_loading(self, layer):
        pass

    def apply_weights(self, layer, x, bias):
        codes = unpack_rows(layer.qweight.data, self.bits).double() - 2 ** (self.bits - 1)
        scales = layer.scales.data.double().repeat_interleave(len(codes) // len(layer.scales), dim=0)
        return (x.double() @ (codes * scales) + bias.double()).to(x.dtype)


def finished(layer, parts, shards):
    for shard, tensors in zip(shards, parts.values(), strict=True):
        load(layer, tensors, shard)
    layer.quant_method.process_weights_after_loading(layer)
    return layer
