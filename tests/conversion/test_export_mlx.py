"""`qalora export mlx`: mlx-lm loads the folder, and computes what transformers does with the merged one."""

import json
import os

import numpy as np
import pytest
import torch
from families.architectures import build
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base, make_tokenizer, quantize
from support.scoring import text_tokens
from transformers import AutoModelForCausalLM

from qalora_plugin import load_base
from qalora_plugin.conversion.export_mlx import export_mlx
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.base import Unsupported

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

TOKENS = text_tokens(2, 96)
EXACT = 1e-4  # of log-probabilities in float32; measured 2e-5


def by_mlx(folder, tokens=TOKENS):
    """Log-probabilities by mlx-lm in float32."""
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32, lambda dtype: dtype in (mx.float16, mx.bfloat16))
    return torch.from_numpy(np.array(model(mx.array(tokens.numpy())))).log_softmax(-1)


@torch.no_grad()
def by_transformers(folder, load=AutoModelForCausalLM.from_pretrained, tokens=TOKENS):
    return load(folder, dtype=torch.float32).eval()(tokens).logits.log_softmax(-1)


CASES = {
    "4 bit": {},
    "3 bit, biases, shards": {"bits": 3, "bias": True, "shards": 3},
    "2 bit, groups of 64": {"bits": 2, "group_size": 64},
    "8 bit, partly dense": {"bits": 8, "dense": ("down_proj",)},
    "one group": {"group_size": -1, "store_g_idx": False},
    "trained scales": {},
}


@pytest.mark.parametrize("case", list(CASES))
def test_mlx_computes_what_transformers_does(tmp_path, case):
    base = make_base(tmp_path / "base", **CASES[case])
    adapter = make_adapter(base, tmp_path / "adapter", std=0.05, scales=case == "trained scales")
    merged = merge(base, adapter, tmp_path / "merged", progress=False).folder
    result = export_mlx(merged, tmp_path / "mlx", progress=False)
    expected = by_transformers(merged)
    assert (by_mlx(result.folder) - expected).abs().max() <= EXACT
    assert (by_transformers(base, load_base) - expected).abs().max() > 0.05  # or the comparison would see no offsets
    assert result.largest_error < 1e-5
    index = json.loads((result.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.nbytes
    assert result.modules == sum(name.endswith(".biases") for name in index["weight_map"])


def test_float16_is_smaller_and_rounded(merged, tmp_path):
    exact, half = (export_mlx(merged, tmp_path / dtype, dtype, progress=False) for dtype in ("float32", "float16"))
    assert half.nbytes < exact.nbytes
    assert 0 < half.largest_error < 0.01
    card = (half.folder / "README.md").read_text()
    assert f"no weight is off by more than {half.largest_error:.1g} of a step" in card
    assert (by_mlx(half.folder) - by_transformers(merged)).abs().mean() <= 1e-2  # measured 3e-3


def test_the_tokenizer_comes_with_it(merged, tmp_path):
    """``mlx_lm.load``, as ``mlx_lm.generate`` calls it."""
    folder = export_mlx(merged, tmp_path / "mlx", progress=False).folder
    model, tokenizer = mlx_lm.load(str(folder))
    assert tokenizer.encode("abc") == make_tokenizer()("abc").input_ids
    assert mlx_lm.generate(model, tokenizer, "abc", max_tokens=4) is not None


def test_tied_embeddings(tmp_path):
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit(base, tie_word_embeddings=True)
    folder = export_mlx(base, tmp_path / "mlx", progress=False).folder
    assert (by_mlx(folder) - by_transformers(base, load_base)).abs().max() <= EXACT


def test_zero_biases_of_every_linear(tmp_path):
    """As tools of 2023 stored them, whatever the config says; mlx-lm has no place for them."""
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    zeros = {
        name.replace("qweight", "bias"): torch.zeros(t.shape[1]).half()
        for name, t in tensors.items() if name.endswith("qweight")
    }  # fmt: skip
    save_file(tensors | zeros, base / "model.safetensors", metadata={"format": "pt"})
    folder = export_mlx(base, tmp_path / "mlx", progress=False).folder
    assert (by_mlx(folder) - by_transformers(base, load_base)).abs().max() <= EXACT


def with_biases(base, value=0.0):
    """One of every quantized linear."""
    tensors = load_file(base / "model.safetensors")
    stored = {name.replace("qweight", "bias"): t.shape[1] for name, t in tensors.items() if name.endswith("qweight")}
    biases = {name: torch.full((size,), value).half() for name, size in stored.items()}
    save_file(tensors | biases, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_zero_biases_where_a_model_has_none(model_type, tmp_path):
    """Some of Qwen2's linears have biases of their own."""
    base = with_biases(base_of(build(model_type), tmp_path / "base"))
    folder = export_mlx(base, tmp_path / "mlx", progress=False).folder
    assert (by_mlx(folder) - by_transformers(base, load_base)).abs().max() <= EXACT
    refused(with_biases(base, 0.5), tmp_path / "out", "which is not zero, and a .*ForCausalLM has no bias there")


def test_zero_biases_of_a_quantized_head(tmp_path):
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    parts = quantize(tensors.pop("lm_head.weight"), 4, 32, False, "gptq")
    save_file(tensors | {f"lm_head.{part}": t.contiguous() for part, t in parts.items()}, base / "model.safetensors")
    folder = export_mlx(with_biases(base), tmp_path / "mlx", progress=False).folder
    assert (by_mlx(folder) - by_transformers(base, load_base)).abs().max() <= EXACT


def test_a_quantized_head_that_is_tied(tmp_path):
    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    parts = quantize(tensors.pop("lm_head.weight"), 4, 32, False, "gptq")
    save_file(tensors | {f"lm_head.{part}": t.contiguous() for part, t in parts.items()}, base / "model.safetensors")
    folder = export_mlx(base, tmp_path / "mlx", progress=False).folder
    assert (by_mlx(folder) - by_transformers(base, load_base)).abs().max() <= EXACT
    edit(base, tie_word_embeddings=True)
    refused(base, tmp_path / "out", "lm_head is quantized, but its config ties it")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def base_of(model, folder):
    """A GPTQ base of any model whose tensors keep their names."""
    model.half().save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        parts = name.split(".")
        linear = parts[-2].endswith("proj") and parts[-1] == "weight"
        made = quantize(tensor, 4, 32, False, "gptq") if linear else {"weight": tensor}
        tensors |= {".".join([*parts[:-1], part]) if linear else name: t.contiguous() for part, t in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit(
        folder, dtype="float16",
        quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
        ("phi3", {}),
        ("gemma2", {}),
        ("gemma3_text", {"num_hidden_layers": 6}),
    ],
)
def test_other_families(tmp_path, name, options):
    """Within the sliding window, which mlx-lm leaves out for some of them."""
    base = base_of(build(name, **options), tmp_path / "base")
    folder, tokens = export_mlx(base, tmp_path / "mlx", progress=False).folder, TOKENS[:, :48]
    assert (by_mlx(folder, tokens) - by_transformers(base, load_base, tokens)).abs().max() <= EXACT


def refused(source, out, message, kind=Unsupported):
    with pytest.raises(kind, match=message) as error:
        export_mlx(source, out, progress=False)
    assert "\n" not in str(error.value)
    assert not list(out.parent.glob(f"*{out.name}*"))


def test_what_mlx_cannot_hold(tmp_path):
    refused(make_base(tmp_path / "a", act_order=True), tmp_path / "out", "act-order.*gptq8")
    refused(make_base(tmp_path / "b", group_size=16), tmp_path / "out", "group size 16.*gptq8")


def test_what_is_no_checkpoint_for_it(tmp_path, merged):
    base = make_base(tmp_path / "base")
    refused(base, base / "out", "inside it", QALoraError)
    weights = base / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    refused(base, tmp_path / "out", "truncated or damaged", QALoraError)
    with pytest.raises(QALoraError, match="dtype is 'bf16'"):
        export_mlx(merged, tmp_path / "out", "bf16")


def test_offsets_that_are_no_numbers(tmp_path, merged):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in merged.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    offsets = load_file(copy / "offsets.safetensors")
    next(iter(offsets.values()))[0, 0] = float("inf")
    save_file(offsets, copy / "offsets.safetensors", metadata={"format": "pt"})
    refused(copy, tmp_path / "out", "holds NaN or Inf", QALoraError)
