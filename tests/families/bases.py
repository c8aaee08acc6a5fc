"""A GPTQ base of any transformers model: random weights, rounded to nearest, saved under the names that it has on disk.

Which tensor on disk is which linear is found by comparing their values, so that tests do not believe the rules of
naming that they test.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_tokenizer, quantize, write_shards
from support.layers import read_stored
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qalora_plugin.core import reference

GROUP = 32
NOT_QUANTIZED = ("vision", "visual", "vit", "audio", "projector", "connector", "merger", "perceiver", "resampler")
QUANTIZATION = {
    "quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False,
    "checkpoint_format": "gptq", "lm_head": False,
}  # fmt: skip


@dataclass
class Base:
    """A base beside its dense twin, the same model with the rounded weights in float32.

    Attributes:
        linears: name in the model → name on disk, of the quantised linears.
        experts: projections of stacked experts, name in the model → names on disk, in order, where quantised.
        turned: those of them, by the name on disk, whose dense weight is ``[K, N]`` (GPT-2's ``Conv1D``).
    """

    folder: Path
    dense: Path
    linears: dict[str, str]
    turned: set[str]
    experts: dict[str, list[str]]


def is_to_be_quantized(name: str, module: nn.Module) -> bool:
    """As a quantiser chooses: the linears of the text's layers, no head, no router, no vision."""
    if not isinstance(module, (nn.Linear, Conv1D)) or any(part in name for part in NOT_QUANTIZED):
        return False
    leaf = name.rsplit(".", 1)[-1]
    inside_layers = any(part.isdigit() for part in name.split("."))
    sizes = module.weight.shape
    return inside_layers and leaf not in ("gate", "router", "weights_proj") and all(size % GROUP == 0 for size in sizes)


def make_base_of(model: PreTrainedModel, folder: Path, quantize_experts: bool = False) -> Base:
    """Save ``model`` as a base and as its dense twin.

    Args:
        quantize_experts: also the experts that transformers stacks in the model and stores one by one.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not parameter.any():
                parameter.normal_(0, 0.02)  # a bias that is dropped must be seen
    model.half().save_pretrained(folder / "fp16")
    stored = {}
    for shard in (folder / "fp16").glob("*.safetensors"):
        stored |= load_file(shard)
    by_value = {_key(tensor): name for name, tensor in stored.items()}
    linears, turned = {}, set()
    for name, module in model.named_modules():
        if is_to_be_quantized(name, module) and (on_disk := by_value.get(_key(module.weight.detach()))):
            linears[name] = on_disk.removesuffix(".weight")
            if isinstance(module, Conv1D):
                turned.add(linears[name])
    experts = stacked_experts(model, by_value) if quantize_experts else {}
    chosen = {*linears.values(), *(name for names in experts.values() for name in names)}
    tensors, dense = {}, {}
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in chosen:
            weight = tensor.t() if module in turned else tensor
            parts = quantize(weight, 4, GROUP, False, "gptq")
            rounded = reference.dequantize(read_stored(parts, 4))
            dense[name] = (rounded if module in turned else rounded.t()).float().contiguous()
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor.contiguous()
            dense[name] = tensor.float() if tensor.is_floating_point() else tensor
    for path, content in ((folder / "base", tensors), (folder / "dense", dense)):
        path.mkdir()
        write_shards(path, content, 1)
        make_tokenizer().save_pretrained(path)
        model.config.save_pretrained(path)
    config = model.config
    config.dtype, config.quantization_config = "float16", dict(QUANTIZATION)
    config.save_pretrained(folder / "base")
    del config.quantization_config
    return Base(folder / "base", folder / "dense", linears, turned, experts)


def stacked_experts(model: PreTrainedModel, by_value: dict[tuple, str]) -> dict[str, list[str]]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
            gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": module.down_proj.detach()}
            for leaf, weights in parts.items():
                found[f"{name}.{leaf}"] = [by_value[_key(weight)].removesuffix(".weight") for weight in weights]
    return found


def fold_into_dense(base: Base, adapter: Path, out: Path, scaling: float) -> Path:
    """The dense twin with an adapter added to its weights by the definition: what merging must equal."""
    weights, factors = load_file(base.dense / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, on_disk in base.linears.items():
        parts = [factors.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB"]
        if parts[0] is not None:
            added = scaling * reference.adapter_offsets(*parts, 1.0).repeat_interleave(GROUP, 0)  # [K, N]
            weights[f"{on_disk}.weight"] += added if on_disk in base.turned else added.t()
    for name, on_disk in base.experts.items():
        lora_a, lora_b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        for i, one in enumerate(on_disk):
            added = scaling * reference.adapter_offsets(lora_a[i], lora_b[i], 1.0).repeat_interleave(GROUP, 0)
            weights[f"{one}.weight"] += added.t()
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for path in base.dense.glob("*.json"):
        if "safetensors" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    return out


def _key(tensor: Tensor) -> tuple:
    return (*tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
