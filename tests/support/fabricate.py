"""Small GPTQ checkpoints made without GPTQModel: a random Llama, rounded to nearest, packed as GPTQ packs.

For unit tests that need many variants. GPTQModel's own checkpoints are tested in ``tests/e2e``.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qalora_plugin.core.packing import pack_rows
from qalora_plugin.formats.gptq_zeros import write_zeros

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantize(weight, bits, group_size, sym, checkpoint_format, act_order=False, generator=None):
    """Round ``weight`` [N, K] to nearest. Returns the four GPTQ tensors."""
    out_features, in_features = weight.shape
    group_size = in_features if group_size == -1 else group_size
    groups, top = in_features // group_size, 2**bits - 1
    g_idx = torch.arange(in_features) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    order = torch.argsort(g_idx, stable=True)
    grouped = weight.t()[order].float().view(groups, group_size, out_features)
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    if sym:
        bound = torch.maximum(-low, high)
        low, high = -bound, bound
    scales = ((high - low) / top).clamp(min=1e-6).half()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if sym else torch.round(-low / scales.float()).clamp(0, top)
    codes = torch.round(grouped / scales.float()[:, None] + zeros[:, None]).clamp(0, top)
    unordered = torch.empty(in_features, out_features, dtype=torch.int64)
    unordered[order] = codes.view(in_features, out_features).long()
    return {
        "qweight": pack_rows(unordered, bits),
        "qzeros": write_zeros(zeros.long(), bits, checkpoint_format),
        "scales": scales,
        "g_idx": g_idx.int(),
    }


def make_base(
    folder: Path,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = False,
    checkpoint_format: str = "gptq",
    act_order: bool = False,
    shards: int = 1,
    bias: bool = False,
    dense: tuple[str, ...] = (),
    store_g_idx: bool = True,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    vocabulary: int = 128,
    tokenizer: PreTrainedTokenizerFast | None = None,
    twin: Path | None = None,
) -> Path:
    """Write a Llama base.

    Args:
        dense: substrings of module names that are left in 16 bit. tokenizer: another one.
        twin: where to write the 16-bit model, too.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, attention_bias=bias, mlp_bias=bias,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).half()
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.data.normal_(0, 0.1)
    if twin:
        model.save_pretrained(twin)
        (tokenizer or make_tokenizer()).save_pretrained(twin)
    generator = torch.Generator().manual_seed(seed)
    tensors, state = {}, model.state_dict()
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if module.endswith(LINEARS) and name.endswith(".weight") and not any(part in module for part in dense):
            parts = quantize(tensor, bits, group_size, sym, checkpoint_format, act_order, generator)
            if not store_g_idx:
                parts.pop("g_idx")
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor.contiguous().clone()
    folder.mkdir(parents=True)
    write_shards(folder, tensors, shards)
    config.quantization_config = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": sym,
        "checkpoint_format": checkpoint_format, "lm_head": False,
    }  # fmt: skip
    if dense:
        config.quantization_config["dynamic"] = {f"-:.*{part}.*": {} for part in dense}
    config.dtype = "float16"
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def write_shards(folder: Path, tensors: dict, shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def to_old_layout(folder: Path, settings_in_config: bool = False) -> Path:
    """Rename the weights of a base as AutoGPTQ named them, and move its settings to where AutoGPTQ kept them."""
    name = "gptq_model-4bit-32g"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text())
        for file in set(listed["weight_map"].values()):
            (folder / file).rename(folder / file.replace("model-", f"{name}-"))
        listed["weight_map"] = {k: file.replace("model-", f"{name}-") for k, file in listed["weight_map"].items()}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(listed))
        index.unlink()
    else:
        (folder / "model.safetensors").rename(folder / f"{name}.safetensors")
    if not settings_in_config:
        config = json.loads((folder / "config.json").read_text())
        found = config.pop("quantization_config")
        (folder / "config.json").write_text(json.dumps(config))
        settings = {key: found[key] for key in ("bits", "group_size", "desc_act", "sym")}
        (folder / "quantize_config.json").write_text(json.dumps(settings | {"damp_percent": 0.01}))
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte-ish character: enough for real text."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {chr(c): c - 28 for c in range(32, 127)} | {"\n": 99}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_adapter(base: Path, folder: Path, seed: int = 0, std: float = 0.02, **lora) -> Path:
    """Save an adapter of ``base`` whose A and B are random, as after some training."""
    from qalora_plugin import add_adapter, load_base

    model = add_adapter(load_base(base, dtype=torch.float32), **{"r": 4, "target_modules": "all-linear", **lora})
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, std, generator=generator)
    model.save_pretrained(folder)
    return folder
