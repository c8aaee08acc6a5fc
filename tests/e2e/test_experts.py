"""Mixture-of-experts, nothing mocked: GPTQModel quantizes experts too → Axolotl → merge → `vllm serve` over HTTP."""

import json
from pathlib import Path

import pytest
import torch
from e2e.test_whole_line import SERVING
from families.architectures import build
from safetensors.torch import load_file
from support.axolotl_runs import BIN, command, write_config
from support.fabricate import make_tokenizer
from support.vllm_server import Server
from transformers import AutoModelForCausalLM

from qalora_plugin import load_base
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.eval.tokens import default_texts
from qalora_plugin.eval.verifying import verify
from qalora_plugin.layers.experts import QuantExpertLinear

pytestmark = pytest.mark.e2e
QUANTIZATION = {"group_size": 32, "sym": False}


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_quantized_experts_go_the_whole_line(tmp_path, name):
    assert (SERVING / ".installed").exists(), f"{SERVING} is not set up: run `make .venv-serve/.installed`"
    model = build(name, hidden_size=128, intermediate_size=128)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.half().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(default_texts()))
    script, base = Path(__file__).with_name("gptqmodel_oracle.py"), tmp_path / "base"
    command(
        SERVING / "bin" / "python", script, tmp_path / "dense", tmp_path / "text.txt", base, json.dumps(QUANTIZATION)
    )
    merged = go_the_line(base, tmp_path)
    if name == "gpt_oss":
        with pytest.raises(AssertionError, match="the server did not start"):
            serve(base, merged, tmp_path)
        said = (tmp_path / "server.log").read_text()
        assert "QALoraError: model.layers.0.mlp.experts: vLLM has a class of its own for this model's experts" in said
    else:
        serve(base, merged, tmp_path)


def go_the_line(base: Path, work: Path) -> Path:
    model = load_base(base, dtype=torch.float32).eval()
    assert len([module for module in model.modules() if isinstance(module, QuantExpertLinear)]) == 6
    theirs = load_file(f"{base}.logits.safetensors")
    with torch.no_grad():
        error = model(input_ids=theirs["tokens"], use_cache=False).logits - theirs["logits"]
    assert error.norm() < 0.01 * theirs["logits"].norm()  # in float16, in which routers may flip
    command(
        BIN / "accelerate", "launch", "-m", "axolotl.cli.train",
        write_config(work, base, max_steps=10, learning_rate=0.01, attn_implementation="eager"),  # GPT-OSS has no SDPA
    )  # fmt: skip
    out, merged = work / "out", work / "out" / "merged"
    assert len(AdapterFolder.open(out).experts) == 6 * 4
    report = verify(base, out, merged, device="cpu", max_tokens=512, progress=False)
    assert report.passed, report.json()
    assert report.router_choices
    return merged


def serve(base: Path, merged: Path, work: Path) -> None:
    prompts = [list(range(4 + i, 24 + i)) for i in range(6)]
    with Server(SERVING, merged, work / "server.log") as server:
        answers = [server.complete(prompt, 40) for prompt in prompts]
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(merged, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    plain = load_base(base, dtype=torch.float32)
    wanted, by_rounding, before = (
        torch.cat([score(model, prompt, tokens) for prompt, (tokens, _) in zip(prompts, answers, strict=True)])
        for model in (exact, rounded, plain)
    )
    found = torch.cat([torch.tensor(logprobs) for _, logprobs in answers])
    ours, theirs, moved = ((other - wanted).abs().mean().item() for other in (found, by_rounding, before))
    assert ours <= 2 * theirs, (ours, theirs, moved)  # vLLM computes in bfloat16, in which routers flip, too
    assert moved > 10 * ours, (moved, ours)


@torch.no_grad()
def score(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the tokens that follow the prompt."""
    logits = model.eval()(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
