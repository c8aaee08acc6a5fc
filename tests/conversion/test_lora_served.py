"""An exported LoRA on a real server, beside its base: by stock vLLM, and over a base that only this plugin serves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base
from support.vllm_server import Server

from qalora_plugin import load_base
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.integrations.peft.loading import load_adapter

pytestmark = pytest.mark.e2e
SERVING = Path(__file__).parents[2] / ".venv-serve"
CASES = {"stock": ({"sym": True}, ()), "asymmetric act-order": ({"act_order": True}, ("--quantization", "qalora"))}
stock_serves_gptq = pytest.mark.skipif(
    not (torch.cuda.is_available() or torch.cpu._is_avx512_supported()),
    reason="vLLM itself serves no GPTQ model on this CPU (no AVX512)",
)


@pytest.mark.parametrize("case", [pytest.param("stock", marks=stock_serves_gptq), "asymmetric act-order"])
def test_served_beside_its_base(tmp_path, case):
    options, flags = CASES[case]
    base = make_base(tmp_path / "base", hidden=256, **options)
    calm(base)
    adapter = make_adapter(base, tmp_path / "adapter", std=0.05, r=8)
    lora = export_lora(adapter, tmp_path / "lora").folder
    prompts = torch.randint(4, 100, (3, 20), generator=torch.Generator().manual_seed(0))
    flags = ("--dtype", "bfloat16", "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={lora}", *flags)
    with Server(SERVING, base, tmp_path / "server.log", *flags) as server:
        answers = {name: [server.complete(row, 60, name) for row in prompts.tolist()] for name in ("merged", "tuned")}
    model = load_adapter(load_base(base, dtype=torch.bfloat16), adapter).eval()
    tuned, found = score(model, prompts, answers["tuned"])
    assert (tuned - found).abs().mean() <= 1e-2
    with model.disable_adapter():
        plain, found_plain = score(model, prompts, answers["merged"])
        assert (plain - found_plain).abs().mean() <= 1e-2
        assert (score(model, prompts, answers["tuned"])[0] - tuned).abs().mean() > 0.05  # the adapter is to be seen


def calm(base):
    """Weights of a trained model's size, or bfloat16 itself would be off by more than the tolerance."""
    tensors = load_file(base / "model.safetensors")
    factors = {"scales": 0.25, "lm_head.weight": 0.1}
    for name in tensors:
        tensors[name] = tensors[name] * next((f for end, f in factors.items() if name.endswith(end)), 1)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def score(model, prompts, answers):
    """Log-probabilities of the generated tokens: transformers', and the server's."""
    generated, found = (torch.tensor(part) for part in zip(*answers, strict=True))
    tokens = torch.cat([prompts, generated], dim=1)
    logprobs = torch.log_softmax(model(tokens).logits.float(), dim=-1)[:, :-1]
    return logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)[:, prompts.shape[1] - 1 :], found
