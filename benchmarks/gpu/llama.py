"""A 7B-shaped Llama made on the device itself, dense or packed, with one kind of adapter: what the training part times.

Weights are random and never on a disk: the codes come from the GPU's own generator, in seconds.
"""

import math

import torch
from gpu.record import DEVICE
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qalora_plugin.core.packing import unpack_rows
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.layers.linear import QuantLinear

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = ("dense", "lora", "qlora", "peft", "ours", "scales")
_STD, _CODE_STD = 0.02, 4.61  # of a weight; of a uniform code 0 … 15


def config_of(tiny: bool) -> LlamaConfig:
    """Llama-2-7B's shape, or a toy's."""
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=128, max_position_embeddings=512)
    return LlamaConfig(max_position_embeddings=16384, attn_implementation="sdpa")


def build(method: str, config: LlamaConfig, rank: int, group_size: int) -> nn.Module:
    """The model that ``method`` trains, frozen but for its adapter.

    Args:
        method: ``dense`` (no adapter: the limit), ``lora`` on bfloat16, ``qlora`` on NF4, ``peft`` (``use_qalora`` over
            a GPTQ linear in plain torch), ``ours``, ``scales`` (ours, and step sizes train).
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    packed = dict.fromkeys(("ours", "scales"), lambda k, n: QuantLinear(GroupwiseSpec("", k, n, 4, group_size)))
    packed["peft"] = lambda k, n: PlainTorchLinear(k, n, group_size)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(TARGETS)) and method in packed:
            model.set_submodule(name, packed[method](module.in_features, module.out_features))
    model = model.to_empty(device=DEVICE)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(DEVICE)  # its buffers are computed, not loaded
    for parameter in model.parameters():
        parameter.data.normal_(0, _STD) if parameter.ndim == 2 else parameter.data.fill_(1)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.set_weight(random_weight(module.in_features, module.out_features, module.group_size))
    model.requires_grad_(False)
    return model if method == "dense" else _with_adapter(model, method, rank, group_size)


def random_weight(k: int, n: int, group_size: int) -> GroupwiseWeight:
    """Random codes, zero-points of 8, scales near one size."""
    groups = k // group_size
    return GroupwiseWeight(
        qweight=torch.empty(k // 8, n, dtype=torch.int32, device=DEVICE).random_(-(2**31), 2**31),
        zeros=torch.full((groups, n), 8, dtype=torch.uint8, device=DEVICE),
        scales=torch.empty(groups, n, device=DEVICE).uniform_(0.9 * _STD / _CODE_STD, 1.1 * _STD / _CODE_STD).half(),
        offsets=None,
        g_idx=None,
        group_order=None,
        bits=4,
        group_size=group_size,
    )


def _with_adapter(model: nn.Module, method: str, rank: int, group_size: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = {"r": rank, "lora_alpha": rank, "target_modules": TARGETS, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    if method in ("ours", "scales"):
        from qalora_plugin.checkpoint.adapter_config import ADAPTER_FORMAT, POOLING, SCALES_FORMAT, SCALES_LR_RATIO
        from qalora_plugin.integrations.peft.adapter import QALoraConfig

        binding = {"format_version": ADAPTER_FORMAT, "pooling": POOLING, "group_size": group_size}
        if method == "scales":
            binding |= {"format_version": SCALES_FORMAT, "scales": True, "scales_lr_ratio": SCALES_LR_RATIO}
        return get_peft_model(model, QALoraConfig(**lora, qalora=binding))
    if method == "peft":  # PEFT pools only over layers of its own list: its sums are repeated here
        for name, module in list(model.named_modules()):
            if isinstance(module, PlainTorchLinear):
                model.set_submodule(name, PeftPooledLinear(module, rank))
        return model
    if method == "qlora":
        from bitsandbytes.nn import Linear4bit, Params4bit

        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.endswith(tuple(TARGETS)):
                nf4 = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16)
                nf4.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(DEVICE)
                model.set_submodule(name, nf4)
        model.is_loaded_in_4bit = True  # by this PEFT chooses its layer
    return get_peft_model(model, LoraConfig(**lora))


class PlainTorchLinear(nn.Module):
    """A GPTQ linear as plain torch computes it: the dense weight anew at every forward, kept for backward."""

    def __init__(self, in_features: int, out_features: int, group_size: int):
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        weight = random_weight(in_features, out_features, group_size)
        self.qweight, self.scales = nn.Buffer(weight.qweight), nn.Buffer(weight.scales.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        codes = unpack_rows(self.qweight, 4).view(-1, self.group_size, self.out_features)
        weight = (codes.to(x.dtype) - 8) * self.scales.to(x.dtype)[:, None]
        return x @ weight.view(self.in_features, self.out_features)


class PeftPooledLinear(nn.Module):
    """What PEFT's ``use_qalora`` adds to a linear: ``B·A·(mean of every group · G)``, as a second path."""

    def __init__(self, base: PlainTorchLinear, rank: int):
        super().__init__()
        self.base, groups = base, base.in_features // base.group_size
        self.lora_a = nn.Parameter(torch.randn(rank, groups, device=DEVICE) / math.sqrt(groups))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, device=DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        groups = self.lora_a.shape[1]
        pooled = x.unflatten(-1, (groups, self.base.group_size)).mean(-1) * groups
        return y + functional.linear(functional.linear(pooled.to(self.lora_a.dtype), self.lora_a), self.lora_b)
