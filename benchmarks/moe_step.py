"""A training step of a mixture-of-experts model whose experts are packed, beside the dense model's.

    python benchmarks/moe_step.py                    on a CPU: 16 experts of 1024×512, 4 a token, two layers
    python benchmarks/moe_step.py --experts 64 --tokens 2048

    dense   the frozen dense model, no adapter: forward and the gradient of every input. The limit.
    lora    PEFT LoRA on it, experts included
    ours    the packed base with an adapter on every linear and expert

All are loaded at once and take turns, so that a machine that slows down slows all of them. bfloat16, autocast.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from models import quantized_tensors
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from train_step_worker import _TARGETS, make_step
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from qalora_plugin import add_adapter, load_base

GROUP_SIZE, RANK = 32, 16
METHODS = ("dense", "lora", "ours")


def make_config(experts: int, top_k: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=1024, hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, num_experts=experts, num_experts_per_tok=top_k, dtype="bfloat16",
    )  # fmt: skip


def write_base(folder: Path, config: Qwen3MoeConfig) -> Path:
    """A GPTQ base of random codes, experts stored one by one."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, parameter in model.named_parameters():
        module, shape = name.removesuffix(".weight"), parameter.shape
        if module.endswith(_TARGETS) and parameter.ndim == 2:
            tensors |= quantized_tensors(module, shape, GROUP_SIZE, generator)
        elif parameter.ndim == 3:
            parent, _, leaf = name.rpartition(".")
            leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            for i in range(shape[0]):
                for one in leaves:
                    size = torch.Size((shape[1] // len(leaves), shape[2]))
                    tensors |= quantized_tensors(f"{parent}.{i}.{one}", size, GROUP_SIZE, generator)
        elif parameter.ndim == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensors[name] = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "checkpoint_format": "gptq"}
    written = config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"], "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def build(method: str, config: Qwen3MoeConfig, work: Path) -> PreTrainedModel:
    lora = {"r": RANK, "lora_alpha": RANK, "target_modules": list(_TARGETS)}
    if method == "ours":
        return add_adapter(load_base(write_base(work / "base", config), dtype=torch.bfloat16), **lora)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    return model if method == "dense" else get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def measure(config: Qwen3MoeConfig, tokens: int, steps: int) -> dict[str, float]:
    """Tokens a second of each method, by the median step."""
    with tempfile.TemporaryDirectory() as folder:
        models = {method: build(method, config, Path(folder)) for method in METHODS}
        run = {method: make_step(model, 1, tokens, False, torch.bfloat16, "cpu") for method, model in models.items()}
        seconds = {method: [] for method in METHODS}
        for i in range(steps + 1):
            for method, step in run.items():
                start = time.perf_counter()
                step()
                if i:  # the first warms up
                    seconds[method].append(time.perf_counter() - start)
    return {method: tokens / statistics.median(times) for method, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(make_config(options.experts, options.top_k), options.tokens, options.steps)
    table = Table("method", "tokens/s", "ours / it")
    for method, speed in found.items():
        table.add_row(method, f"{speed:.0f}", f"{found['ours'] / speed:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
