"""One method of ``train_step.py`` in a process of its own: builds the model, then runs a step for every line on stdin.

Takes a JSON object as its argument; answers on stdout, on lines that start with @@: ``{"ready": …}``, then
``{"seconds": …, "loss": …}`` a step, and ``{"peak_mb": …}`` when stdin closes.
"""

import json
import sys
import time
from pathlib import Path

import torch

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build(
    method: str, dense: str, base: str, rank: int, group_size: int, dtype: torch.dtype, device: str
) -> torch.nn.Module:
    """The model that ``method`` trains; its trainable parameters are the adapter's."""
    options = {"dtype": dtype, "device_map": device, "attn_implementation": "sdpa"}
    lora = {"r": rank, "lora_alpha": rank, "target_modules": list(_TARGETS), "lora_dropout": 0.0}
    if method in ("ours", "scales"):
        from qalora_plugin import add_adapter, load_base

        return add_adapter(load_base(base, **options), scales=method == "scales", **lora)
    from transformers import AutoModelForCausalLM

    if method == "dense":
        model = AutoModelForCausalLM.from_pretrained(dense, **options)
        return model.requires_grad_(False)
    from peft import LoraConfig, get_peft_model

    if method == "lora":
        model = AutoModelForCausalLM.from_pretrained(dense, **options)
    elif method == "qlora":
        from transformers import BitsAndBytesConfig

        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=nf4, **options)
    elif method == "peft":
        from gptqmodel import GPTQModel

        backend = "gptq_torch" if device == "cpu" else "gptq_triton"
        model = GPTQModel.load(base, backend=backend, device=device, dtype=dtype).model
        lora |= {"use_qalora": True, "qalora_group_size": group_size}
    else:
        raise ValueError(f"unknown method {method!r}")
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def make_step(model, batch: int, length: int, checkpointing: bool, dtype: torch.dtype, device: str):
    """A function that runs one training step as the HF Trainer does (autocast, if bf16) and returns the loss."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if checkpointing or not any(parameter.requires_grad for parameter in model.parameters()):
        model.enable_input_require_grads()  # as PEFT does for checkpointing; without an adapter it is all there is
    model.config.use_cache = False
    model.train()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step


def peak_mb(device: str) -> float:
    """Peak memory since :func:`reset_peak`: of the GPU's allocator, or of this whole process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def say(**values) -> None:
    print("@@" + json.dumps(values), flush=True)


def main(spec: dict) -> None:
    torch.manual_seed(0)
    device = spec["device"]
    if device == "cpu":
        torch.set_num_threads(spec["threads"])
    dtype = getattr(torch, spec["dtype"])
    model = build(spec["method"], spec["dense"], spec["base"], spec["rank"], spec["group_size"], dtype, device)
    step = make_step(model, spec["batch"], spec["length"], spec["checkpointing"], dtype, device)
    for _ in range(spec["warmup"]):
        step()
    reset_peak(device)
    say(ready=True, versions=versions())
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        if device != "cpu":
            torch.cuda.synchronize()
        say(seconds=time.perf_counter() - start, loss=loss)
    say(peak_mb=peak_mb(device))


def versions() -> dict[str, str]:
    return {
        name: sys.modules[name].__version__
        for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "gptqmodel")
        if name in sys.modules
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
