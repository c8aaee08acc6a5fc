"""The methods of the accuracy table: each builds the model that it trains, and from that the one that is measured.

What is measured runs in float32: of ours the merged checkpoint, of the others base + adapter, not merged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from tuning.jobs import Job

from qalora_plugin import add_adapter, load_base, merge
from qalora_plugin.integrations.peft import scales
from qalora_plugin.integrations.peft.adapter import QALoraLayer
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.methods.calibrating import calibrate

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CALIBRATED_ON = 64  # sequences
USUAL_EVERY = scales.GRADIENT_EVERY


@dataclass(frozen=True)
class Places:
    """Where a run finds what it needs, and leaves its adapter.

    Attributes:
        data: folder that :func:`tuning.data.prepare` filled. bases: what was quantized. adapter, merged: new folders.
    """

    data: Path
    bases: Path
    adapter: Path
    merged: Path
    device: str

    @property
    def dense(self) -> Path:
        return self.data / "model"

    def base(self, job: Job) -> Path:
        return self.bases / job.base


def dense(places: Places, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(places.dense, dtype=dtype).to(places.device)


def linears(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if name.endswith(tuple(TARGETS))}


def lora_options(job: Job) -> dict[str, Any]:
    """What all adapters are made with."""
    return {"r": job.rank, "lora_alpha": job.rank, "target_modules": TARGETS, "lora_dropout": 0.0}


# ---- on the 16-bit model


def build_lora(job: Job, places: Places) -> nn.Module:
    return get_peft_model(dense(places, torch.bfloat16), LoraConfig(task_type="CAUSAL_LM", **lora_options(job)))


def lora_in_float32(model: Any, job: Job, places: Places) -> nn.Module:
    model.save_pretrained(places.adapter)
    return PeftModel.from_pretrained(dense(places, torch.float32), places.adapter)


def build_qlora(job: Job, places: Places) -> nn.Module:
    """LoRA over what NF4 makes of the weights: what bitsandbytes multiplies by, too, anew at every step."""
    return get_peft_model(_nf4(places, torch.bfloat16), LoraConfig(task_type="CAUSAL_LM", **lora_options(job)))


def qlora_in_float32(model: Any, job: Job, places: Places) -> nn.Module:
    model.save_pretrained(places.adapter)
    return PeftModel.from_pretrained(_nf4(places, torch.float32), places.adapter)


def _nf4(places: Places, dtype: torch.dtype) -> PreTrainedModel:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = dense(places, torch.bfloat16)
    for linear in linears(model).values():
        packed, state = quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=True)
        linear.weight.data = dequantize_4bit(packed, state)
    return model.to(dtype)


def build_galore(job: Job, places: Places) -> nn.Module:
    """Trains the linears whole, in float32; the Trainer's optimizer projects their gradients."""
    model = dense(places, torch.float32).requires_grad_(False)
    for linear in linears(model).values():
        linear.requires_grad_(True)
    return model


def as_it_is(model: nn.Module, job: Job, places: Places) -> nn.Module:
    return model


# ---- on an INT base, ours


def build_offsets(job: Job, places: Places) -> nn.Module:
    return _ours(job, places)


def build_scales(job: Job, places: Places) -> nn.Module:
    return _ours(job, places, scales=True)


def build_scales_all_tokens(job: Job, places: Places) -> nn.Module:
    """The scales' gradient of every token, not of every fourth."""
    return _ours(job, places, every=1, scales=True)


def build_calibrated(job: Job, places: Places) -> nn.Module:
    """Starts where base + adapter is closest to the 16-bit model on the text that the base was calibrated on."""
    model = build_scales(job, places)
    calibrate(model, places.dense, places.data / "calibration.jsonl", samples=CALIBRATED_ON, progress=False)
    return model


def build_peqa(job: Job, places: Places) -> nn.Module:
    """Every step size free, by the gradient of all tokens: D is the identity and does not train, nor do offsets."""
    groups = {
        name.rpartition(".")[2]: layer.groups
        for name, layer in load_base(places.base(job)).named_modules()
        if isinstance(layer, QuantLinear)
    }
    ranks = {"r": max(groups.values()), "rank_pattern": groups}
    model = _ours(job, places, every=1, scales=True, scales_lr_ratio=1.0, **ranks)
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, QALoraLayer):
            torch.nn.init.eye_(layer.lora_D["default"].weight)
            layer.lora_C["default"].weight.requires_grad_(True)
    return model


def _ours(job: Job, places: Places, every: int = USUAL_EVERY, **options: Any) -> PeftModel:
    """``every``: the scales' gradient is of one token in so many."""
    scales.GRADIENT_EVERY = every
    base = load_base(places.base(job), dtype=torch.bfloat16, device_map=places.device)
    return add_adapter(base, **{**lora_options(job), **options})


def merged(model: Any, job: Job, places: Places) -> nn.Module:
    model.save_pretrained(places.adapter)
    folder = merge(places.base(job), places.adapter, places.merged).folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=places.device)


# ---- on an INT base, PEFT's


class DenseTwin(nn.Linear):
    """A dense linear of a quantized one, on which PEFT puts what it puts on GPTQModel's."""

    def __init__(self, layer: QuantLinear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(layer.dense_weight().t().contiguous(), requires_grad=False)


def build_peft(job: Job, places: Places) -> nn.Module:
    config = LoraConfig(task_type="CAUSAL_LM", use_qalora=True, qalora_group_size=job.group_size, **lora_options(job))
    return get_peft_model(_twin(job, places, torch.bfloat16), _with_twins(config))


def peft_in_float32(model: Any, job: Job, places: Places) -> nn.Module:
    model.save_pretrained(places.adapter)
    config = _with_twins(LoraConfig.from_pretrained(places.adapter))
    return PeftModel.from_pretrained(_twin(job, places, torch.float32), places.adapter, config=config)


def _with_twins(config: LoraConfig) -> LoraConfig:
    config._register_custom_module({DenseTwin: GPTQLoraLinear})
    return config


def _twin(job: Job, places: Places, dtype: torch.dtype) -> PreTrainedModel:
    model = load_base(places.base(job), dtype=dtype, device_map=places.device)
    for name, layer in linears(model).items():
        model.set_submodule(name, DenseTwin(layer).to(dtype))
    return model


# ---- nothing trained


def untuned(job: Job, places: Places) -> nn.Module:
    if not job.bits:
        return dense(places, torch.float32)
    return load_base(places.base(job), dtype=torch.float32, device_map=places.device)


def merge_lora(adapter: Path, places: Places) -> Path:
    """The 16-bit model that a trained LoRA makes, as a folder to quantize."""
    model = PeftModel.from_pretrained(dense(places, torch.float32), adapter).merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(places.merged)
    AutoTokenizer.from_pretrained(places.dense).save_pretrained(places.merged)
    return places.merged


Build = Callable[[Job, Places], nn.Module]
Finish = Callable[[Any, Job, Places], nn.Module]
METHODS: dict[str, tuple[Build, Finish]] = {
    "lora": (build_lora, lora_in_float32),
    "qlora": (build_qlora, qlora_in_float32),
    "galore": (build_galore, as_it_is),
    "peft": (build_peft, peft_in_float32),
    "offsets": (build_offsets, merged),
    "scales": (build_scales, merged),
    "scales-all-tokens": (build_scales_all_tokens, merged),
    "scales-calibrated": (build_calibrated, merged),
    "peqa": (build_peqa, merged),
}
