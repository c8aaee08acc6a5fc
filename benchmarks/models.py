"""Llama-shaped models with random weights, dense and as a GPTQ base: the benchmarks' subjects.

Timings depend on shapes and layouts only, so the codes are random bits and nothing is quantised; no download either.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qalora_plugin.formats.gptq import Gptq

SHAPES = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": True,
    },
    "99m": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 8192, "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
_STD = 0.02
_CODE_STD = 4.61  # of uniform codes 0 … 15


def config_of(shape: str) -> LlamaConfig:
    return LlamaConfig(**SHAPES[shape], max_position_embeddings=16384, dtype="bfloat16")


def write_dense(folder: Path, shape: str) -> Path:
    """A 16-bit checkpoint. Returns ``folder``; does nothing if it is there."""
    return _write(folder, shape, None)


def write_base(folder: Path, shape: str, group_size: int) -> Path:
    """A 4-bit asymmetric GPTQ checkpoint of the same shape, as GPTQModel writes them."""
    return _write(folder, shape, group_size)


def _write(folder: Path, shape: str, group_size: int | None) -> Path:
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    config = config_of(shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weight_map, total = {}, 0
    layers = [f"model.layers.{i}." for i in range(config.num_hidden_layers)]
    for part, prefix in enumerate(["", *layers]):  # one shard a layer keeps memory low at 7B
        tensors = {}
        for name, parameter in model.named_parameters():
            if name.startswith(prefix) if prefix else not name.startswith("model.layers."):
                is_linear = parameter.ndim == 2 and prefix
                if is_linear and group_size:
                    tensors |= quantized_tensors(name.removesuffix(".weight"), parameter.shape, group_size, generator)
                else:
                    tensors[name] = _dense(parameter.shape, generator)
        file = f"model-{part + 1:05d}-of-{len(layers) + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    written = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    if group_size:
        settings = {
            "bits": 4, "group_size": group_size, "desc_act": False, "sym": False, "lm_head": False,
            "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:7.6.0"]},
        }  # fmt: skip
        written["quantization_config"] = {"quant_method": Gptq.method, **settings}
        (folder / "quantize_config.json").write_text(json.dumps({"quant_method": Gptq.method, **settings}))
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # GPTQModel loads none without one
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(written, indent=2))  # last: it marks the folder as complete
    return folder


def _dense(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * _STD).bfloat16()


def quantized_tensors(
    name: str, shape: torch.Size, group_size: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    n, k = shape
    groups = k // group_size
    words = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, generator=generator)
    return {
        f"{name}.qweight": words,
        f"{name}.qzeros": torch.full((groups, n // 8), 0x76767676, dtype=torch.int32),  # zeros 7 and 8, stored − 1
        f"{name}.scales": (torch.rand(groups, n, generator=generator) * 0.2 + 0.9).mul(_STD / _CODE_STD).half(),
        f"{name}.g_idx": (torch.arange(k) // group_size).int(),
    }
