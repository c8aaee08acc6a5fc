"""The line that everything stands on, nothing mocked: GPTQModel → Axolotl → merge → `vllm serve` over HTTP."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.axolotl_runs import BIN, command, write_config
from support.fabricate import make_tokenizer
from support.vllm_server import Server
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qalora_plugin import load_base
from qalora_plugin.eval.tokens import default_texts
from qalora_plugin.eval.verifying import verify
from qalora_plugin.layers.linear import QuantLinear

pytestmark = pytest.mark.e2e
SERVING = Path(__file__).parents[2] / ".venv-serve"
GENERATION = {"eos_token_id": 2, "max_new_tokens": 77}
KINDS = {
    "asymmetric": {"group_size": 32, "sym": False},
    "act-order": {"group_size": 64, "sym": True, "act_order": True},
    "v1 asymmetric": {"group_size": 128, "sym": False, "checkpoint_format": "gptq"},
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A dense Llama with heads that vLLM's CPU attention takes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.05,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dense") / "model"
    LlamaForCausalLM(config).half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    for name in ("LICENSE", "preprocessor_config.json"):
        (folder / name).write_text('{"image_mean": [0.5]}')
    (folder / "run.log").write_text("no part of a model")
    return folder


@pytest.fixture(scope="module")
def quantized(dense, tmp_path_factory):
    """Kind → its base, quantised once by `qalora quantize` in the serving environment."""
    assert (SERVING / ".installed").exists(), f"{SERVING} is not set up: run `make .venv-serve/.installed`"
    folder = tmp_path_factory.mktemp("quantised")
    (folder / "text.txt").write_text("\n".join(default_texts()))
    script = Path(__file__).with_name("gptqmodel_oracle.py")

    @cache
    def quantize(kind: str) -> Path:
        base = folder / kind
        command(SERVING / "bin" / "python", script, dense, folder / "text.txt", base, json.dumps(KINDS[kind]))
        return base

    return quantize


@pytest.mark.parametrize("kind", KINDS)
def test_reads_gptqmodels_checkpoint_as_gptqmodel_does(quantized, kind):
    base = quantized(kind)
    expected = load_file(f"{base}.dense.safetensors")
    found = {name: module for name, module in load_base(base).named_modules() if isinstance(module, QuantLinear)}
    assert found.keys() == expected.keys()
    assert len(found) == 14
    for name, module in found.items():
        torch.testing.assert_close(module.dense_weight(), expected[name], rtol=2**-10, atol=1e-6)  # float16 there
    assert any(module.g_idx is not None for module in found.values()) == (kind == "act-order")


def test_what_lies_beside_the_weights_comes_along(dense, quantized):
    """GPTQModel has models sample, and leaves licences and most families' processors behind."""
    base = quantized("asymmetric")
    assert json.loads((base / "generation_config.json").read_text()) == GENERATION
    for name in ("LICENSE", "preprocessor_config.json"):
        assert (base / name).read_text() == (dense / name).read_text()
    assert not (base / "run.log").exists()
    assert AutoTokenizer.from_pretrained(base)("abc").input_ids == AutoTokenizer.from_pretrained(dense)("abc").input_ids


def test_trains_merges_serves(quantized, tmp_path):
    base = quantized("asymmetric")
    command(
        BIN / "accelerate", "launch", "-m", "axolotl.cli.train",
        write_config(tmp_path, base, max_steps=20, learning_rate=0.003),
    )  # fmt: skip
    out, merged = tmp_path / "out", tmp_path / "out" / "merged"
    assert verify(base, out, merged, device="cpu", max_tokens=512, progress=False).passed

    prompts = [list(range(4 + i, 24 + i)) for i in range(6)]
    with Server(SERVING, merged, tmp_path / "server.log") as server:  # its dtype, too, is vLLM's own choice
        answers = [server.complete(prompt, 40) for prompt in prompts]
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    plain = load_base(base, dtype=torch.float32).eval()
    differences = {id(model): [], id(plain): []}
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        for one in (model, plain):
            with torch.no_grad():
                scores = one(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected = scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            differences[id(one)].append((expected - torch.tensor(logprobs)).abs().mean())
    merged_difference, base_difference = (torch.stack(values).mean() for values in differences.values())
    # vLLM computes in bfloat16 here, transformers in float32: bfloat16 alone moves a log-probability by about 0.008
    assert merged_difference < 0.015
    assert base_difference > 10 * merged_difference
