"""A GPTQ base of any transformers model: random weights, rounded to nearest, saved under the names that it has on disk.

Which tensor on disk is which linear is found by comparing their values, so that tests do not believe the rules of
naming that they test.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
    "checkpoint_format": "gptq", "lm_head": False, "meta": {"quantizer": ["gptqmodel:7.6.0"]},
}  # fmt: skip


class Place(NamedTuple):
    """Where the dense twin has the weight of a linear: a tensor ``[N, K]``, or a part of one.

    Attributes:
        turned: the tensor is ``[K, N]`` (GPT-2's ``Conv1D``, GPT-OSS's experts).
        expert, columns: of experts that are stacked on disk, gate and up in one.
    """

    tensor: str
    turned: bool = False
    expert: int | None = None
    columns: slice = slice(None)

    def of(self, tensors: dict[str, Tensor]) -> Tensor:
        """The weight ``[K, N]``, a view."""
        found = tensors[self.tensor] if self.expert is None else tensors[self.tensor][self.expert]
        return (found if self.turned else found.t())[:, self.columns]


@dataclass
class Base:
    """A base beside its dense twin, the same model with the rounded weights in float32.

    Attributes:
        linears: name in the model → name on disk, of the quantised linears.
        experts: projections of stacked experts, name in the model → names on disk, in order, where quantised.
        places: where their dense weights are, by the name on disk.
    """

    folder: Path
    dense: Path
    linears: dict[str, str]
    experts: dict[str, list[str]]
    places: dict[str, Place]


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
    linears, places = {}, {}
    for name, module in model.named_modules():
        if is_to_be_quantized(name, module) and (on_disk := by_value.get(_key(module.weight.detach()))):
            linears[name] = on_disk.removesuffix(".weight")
            places[linears[name]] = Place(on_disk, isinstance(module, Conv1D))
    experts, of_experts = stacked_experts(model, by_value) if quantize_experts else ({}, {})
    places |= of_experts
    left = {place.tensor for place in places.values()}
    tensors = {name: tensor.contiguous() for name, tensor in stored.items() if name.removesuffix("_bias") not in left}
    dense = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    for name, place in places.items():
        weight = place.of(dense)
        parts = quantize(weight.t(), 4, GROUP, False, "gptq")
        weight.copy_(reference.dequantize(read_stored(parts, 4)))
        if place.expert is not None and (bias := stored.get(f"{place.tensor}_bias")) is not None:
            parts["bias"] = bias[place.expert, place.columns]
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
    for path, content in ((folder / "base", tensors), (folder / "dense", dense)):
        path.mkdir()
        write_shards(path, content, 1)
        make_tokenizer().save_pretrained(path)
        model.config.save_pretrained(path)
    config = model.config
    config.dtype, config.quantization_config = "float16", dict(QUANTIZATION)
    config.save_pretrained(folder / "base")
    del config.quantization_config
    return Base(folder / "base", folder / "dense", linears, experts, places)


def stacked_experts(
    model: PreTrainedModel, by_value: dict[tuple, str]
) -> tuple[dict[str, list[str]], dict[str, Place]]:
    """``experts`` and ``places`` of a :class:`Base`."""
    experts: dict[str, list[str]] = {}
    places: dict[str, Place] = {}
    for name, module in model.named_modules():
        if getattr(getattr(module, "gate_up_proj", None), "ndim", None) != 3:
            continue
        if fused := by_value.get(_key(module.gate_up_proj.detach())):  # stacked on disk too: GPTQModel takes it apart
            parent, down = fused.rpartition(".")[0], by_value[_key(module.down_proj.detach())]
            inner = module.down_proj.shape[1 if module.is_transposed else 2]
            halves = {"gate_proj": (fused, slice(inner)), "up_proj": (fused, slice(inner, None))}
            for leaf, (tensor, columns) in (halves | {"down_proj": (down, slice(None))}).items():
                experts[f"{name}.{leaf}"] = [f"{parent}.{i}.{leaf}" for i in range(len(module.down_proj))]
                for i, one in enumerate(experts[f"{name}.{leaf}"]):
                    places[one] = Place(tensor, module.is_transposed, i, columns)
            continue
        gate, up = module.gate_up_proj.detach().chunk(2, dim=1)
        for leaf, weights in {"gate_proj": gate, "up_proj": up, "down_proj": module.down_proj.detach()}.items():
            on_disk = [by_value[_key(weight)] for weight in weights]
            experts[f"{name}.{leaf}"] = [one.removesuffix(".weight") for one in on_disk]
            places |= {one.removesuffix(".weight"): Place(one) for one in on_disk}
    return experts, places


def fold_into_dense(base: Base, adapter: Path, out: Path, scaling: float) -> Path:
    """The dense twin with an adapter added to its weights by the definition: what merging must equal."""
    weights, factors = load_file(base.dense / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, on_disk in base.linears.items():
        parts = [factors.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB"]
        if parts[0] is not None:
            added = scaling * reference.adapter_offsets(*parts, 1.0).repeat_interleave(GROUP, 0)  # [K, N]
            base.places[on_disk].of(weights).add_(added)
    for name, on_disk in base.experts.items():
        lora_a, lora_b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        for i, one in enumerate(on_disk):
            added = scaling * reference.adapter_offsets(lora_a[i], lora_b[i], 1.0).repeat_interleave(GROUP, 0)
            base.places[one].of(weights).add_(added)
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for path in base.dense.glob("*.json"):
        if "safetensors" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    return out


def _key(tensor: Tensor) -> tuple:
    return (*tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
