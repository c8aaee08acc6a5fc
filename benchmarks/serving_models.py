"""Subjects of the serving benchmarks: one Llama shape as 16-bit model, symmetric GPTQ base, merged model and LoRA.

Speed depends on shapes and layouts, not on what a model says: codes, scales and offsets are random, nothing is trained.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from qalora_plugin.conversion.writer import write_model

SHAPES = {  # hidden, MLP, layers, heads, key-value heads, vocabulary
    "2m": (256, 512, 2, 4, 2, 512),
    "50m": (1024, 2816, 4, 16, 4, 8192),
    "100m": (1024, 2816, 8, 16, 4, 8192),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
RANK = 16
_STD = 0.02


def write_models(folder: Path, size: str, group_size: int) -> None:
    """Write ``dense``, ``base``, ``merged`` and ``lora`` into ``folder``."""
    config, generator = _config(size), torch.Generator().manual_seed(0)
    linears = dict(_linears(config))
    rest = dict(_rest(config, generator))
    quantisation = {
        "bits": 4, "group_size": group_size, "desc_act": False, "sym": True, "checkpoint_format": "gptq",
    }  # fmt: skip
    dense = {f"{name}.weight": _random((n, k), generator) for name, (k, n) in linears.items()}
    _write(folder / "dense", config, dense | rest)
    del dense
    packed = {}
    for name, (k, n) in linears.items():
        packed |= {f"{name}.{part}": tensor for part, tensor in quantised(k, n, group_size, generator).items()}
    _write(folder / "base", config, packed | rest, {"quant_method": "gptq", **quantisation})
    offsets = {
        f"{name}.offsets": (torch.randn(k // group_size, n, generator=generator) * 1e-3).half()
        for name, (k, n) in linears.items()
    }
    (folder / "merged").mkdir()
    merged = {"offset_dtype": "float16", **quantisation}
    write_model(folder / "merged", config.to_dict(), merged, (packed | rest | offsets).items())
    _write_lora(folder / "lora", folder / "base", linears, generator)


def quantised(k: int, n: int, group_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A symmetric 4-bit GPTQ linear ``[K, N]``: random codes, v1 zeros of 8 (stored as 7), scales near one size."""
    groups = k // group_size
    return {
        "qweight": torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, generator=generator),
        "qzeros": torch.full((groups, n // 8), 0x77777777, dtype=torch.int32),
        "scales": (_STD / 4.6 * (0.9 + 0.2 * torch.rand(groups, n, generator=generator))).half(),
        "g_idx": (torch.arange(k) // group_size).int(),
    }


def _config(size: str) -> LlamaConfig:
    hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[size]
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=4096, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _linears(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and ``(K, N)`` of every linear that a GPTQ base quantises."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    sizes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, mlp), "mlp.up_proj": (hidden, mlp),
        "mlp.down_proj": (mlp, hidden),
    }  # fmt: skip
    for layer in range(config.num_hidden_layers):
        for name, size in sizes.items():
            yield f"model.layers.{layer}.{name}", size


def _rest(config: LlamaConfig, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    table = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", _random(table, generator)
    yield "lm_head.weight", _random(table, generator)
    norms = [
        f"model.layers.{layer}.{name}_layernorm"
        for layer in range(config.num_hidden_layers)
        for name in ("input", "post_attention")
    ]
    for name in [*norms, "model.norm"]:
        yield f"{name}.weight", torch.ones(config.hidden_size, dtype=torch.bfloat16)


def _random(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return (torch.randn(shape, generator=generator) * _STD).bfloat16()


def _write(folder: Path, config: LlamaConfig, tensors: dict[str, Tensor], quantization: dict | None = None) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = config.to_dict() | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(content))


def _write_lora(folder: Path, base: Path, linears: dict, generator: torch.Generator) -> None:
    folder.mkdir()
    tensors = {}
    for name, (k, n) in linears.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _random((RANK, k), generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _random((n, RANK), generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    leaves = sorted({name.rsplit(".", 1)[1] for name in linears})
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": leaves, "bias": "none"}))
