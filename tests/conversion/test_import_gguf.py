"""A GGUF file becomes a base: against the model it was made of, transformers' loading of it, and llama.cpp."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from support.gguf_files import ARCHITECTURES, VOCABULARY, make_model, make_tokenizer, rewritten, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora_plugin import load_base
from qalora_plugin.conversion.import_gguf import import_gguf
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf.reading import GgufFile
from qalora_plugin.formats.opened import QuantizedCheckpoint

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
SAYS = "It costs 12345 €, don't  you\n\n think?"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def q4_1(tokenizer, tmp_path_factory):
    """A Llama of Q4_1, its model, and its import."""
    folder, model = tmp_path_factory.mktemp("q4_1"), make_model("llama")
    file = write_gguf(folder / "model.gguf", model, tokenizer, "Q4_1", embeddings="Q8_0")
    return file, model, import_gguf(file, folder / "base", progress=False)


def weights_of(folder):
    opened = QuantizedCheckpoint.open(folder)
    opened.check_values()
    return {name: reference.dequantize(opened.weight(name)).T for name in opened.specs}


@torch.no_grad()
def logits(model, ids):
    return model(torch.tensor([ids])).logits[0].float()


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_gives_exactly_the_weights_in_the_file(kind, tokenizer, tmp_path):
    model = make_model("llama")
    file = write_gguf(tmp_path / "model.gguf", model, tokenizer, kind)
    result = import_gguf(file, tmp_path / "base", progress=False)

    weights = weights_of(result.folder)
    assert len(weights) == result.linears == 14
    for name, weight in weights.items():
        assert torch.equal(weight.float(), model.get_submodule(name).weight), name
    symmetric = kind in ("Q4_0", "Q5_0", "Q8_0", "Q6_K")
    assert result.method == ("gptq" if symmetric else "qalora")
    config = json.loads((result.folder / "config.json").read_text())["quantization_config"]
    assert config["sym"] is symmetric
    assert config["quant_method"] == result.method
    assert config["bits"] == (4 if "Q4" in kind else 8)
    assert config["group_size"] == (16 if kind == "Q6_K" else 32)
    assert config["source"] == {"file": "model.gguf", "types": {"F16": 1, kind: 14, "F32": 5}}
    assert result.losses == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_computes_what_it_did(architecture, tokenizer, tmp_path):
    model = make_model(architecture)
    file = write_gguf(tmp_path / "model.gguf", model, tokenizer, {"": "Q4_1", "ffn_down": "Q6_K"}, embeddings="F32")
    result = import_gguf(file, tmp_path / "base", progress=False)
    ids = list(range(3, 300, 2))
    expected = logits(model, ids)
    found = logits(load_base(result.folder, dtype=torch.float32), ids)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_llama_cpp_computes_the_same(architecture, tokenizer, tmp_path):
    from support.llama_cpp import LlamaCpp, log_probabilities

    model = make_model(architecture)
    file = write_gguf(tmp_path / "model.gguf", model, tokenizer, "F32", embeddings="F32")
    ids = list(range(3, 300, 2))
    with LlamaCpp(file) as theirs:
        found = theirs.logits(ids)
        assert theirs.tokenize(SAYS) == tokenizer(SAYS)["input_ids"]
    assert np.abs(log_probabilities(found, ids) - log_probabilities(logits(model, ids).numpy(), ids)).mean() < 1e-3


def test_as_transformers_reads_the_file(q4_1):
    file, _, result = q4_1
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for name, weight in weights_of(result.folder).items():
        assert torch.equal(weight.float(), theirs.get_submodule(name).weight), name


def test_embeddings_are_rounded_to_float16_and_the_loss_is_said(q4_1):
    _, model, result = q4_1
    stored = QuantizedCheckpoint.open(result.folder).files.tensor("model.embed_tokens.weight")
    exact = model.get_input_embeddings().weight
    assert torch.equal(stored, exact.half())
    error = (stored.float() - exact).abs().amax(1) / exact.abs().amax(1).clamp(min=1e-30)
    assert result.losses == {"model.embed_tokens.weight": pytest.approx(error.max().item(), rel=1e-6)}
    assert 0 < error.max() < 2**-10


def test_floats_stay_as_they_are_stored(q4_1):
    file, _, result = q4_1
    opened = QuantizedCheckpoint.open(result.folder).files
    stored = GgufFile.open(file).tensors
    assert opened.tensors["model.norm.weight"].dtype == "F32"
    np.testing.assert_array_equal(opened.array("model.norm.weight"), stored["output_norm.weight"].data)


def test_the_tokenizer_is_rebuilt(q4_1, tokenizer):
    _, _, result = q4_1
    rebuilt = AutoTokenizer.from_pretrained(result.folder)
    assert rebuilt(SAYS)["input_ids"] == tokenizer(SAYS)["input_ids"]
    assert rebuilt.decode(rebuilt(SAYS)["input_ids"]) == SAYS
    assert (rebuilt.bos_token, rebuilt.eos_token, rebuilt.pad_token) == ("<s>", "</s>", "<pad>")
    config = json.loads((result.folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 2)
    assert json.loads((result.folder / "generation_config.json").read_text())["eos_token_id"] == 1


def test_a_given_tokenizer_is_held_against_the_file(q4_1, tokenizer, tmp_path):
    file, _, _ = q4_1
    tokenizer.save_pretrained(tmp_path / "own")
    result = import_gguf(file, tmp_path / "base", tokenizer=tmp_path / "own", progress=False)
    assert AutoTokenizer.from_pretrained(result.folder)(SAYS)["input_ids"] == tokenizer(SAYS)["input_ids"]

    from tokenizers import pre_tokenizers

    make_tokenizer(pre_tokenizers.Digits(individual_digits=True)).save_pretrained(tmp_path / "another")
    with pytest.raises(QALoraError, match=r"is not the tokenizer of .*model.gguf: token \d+ is"):
        import_gguf(file, tmp_path / "no", tokenizer=tmp_path / "another", progress=False)
    assert not (tmp_path / "no").exists()


def test_a_given_config_is_used_and_held_against_the_file(q4_1, tmp_path):
    file, model, _ = q4_1
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    model.config.save_pretrained(tmp_path / "config")
    result = import_gguf(file, tmp_path / "base", model_config=tmp_path / "config", progress=False)
    assert json.loads((result.folder / "config.json").read_text())["rope_parameters"]["rope_theta"] == 500.0
    model.config.intermediate_size = 256
    model.config.save_pretrained(tmp_path / "config")
    with pytest.raises(QALoraError, match=r"ffn_.* is \(512, 256\), by its metadata it should be \(256, 256\)"):
        import_gguf(file, tmp_path / "no", model_config=tmp_path / "config", progress=False)


def test_mixed_types_in_a_fused_layer_are_told(tokenizer, tmp_path, caplog):
    file = write_gguf(
        tmp_path / "model.gguf", make_model("llama"), tokenizer, {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "F16"}
    )
    result = import_gguf(file, tmp_path / "base", progress=False)
    assert "vLLM runs q_proj, k_proj, v_proj as one layer" in result.unservable
    assert result.unservable in caplog.text
    assert Counter(spec.bits for spec in QuantizedCheckpoint.open(result.folder).specs.values()) == {4: 10, 8: 2}
    dynamic = json.loads((result.folder / "config.json").read_text())["quantization_config"]["dynamic"]
    assert dynamic == {
        r"+:model\.layers\.\d+\.self_attn\.v_proj$": {"bits": 8, "group_size": 16},
        r"-:model\.layers\.\d+\.mlp\.down_proj$": {},
    }
    load_base(result.folder)


def test_types_without_groups_are_refused_by_name(tokenizer, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", make_model("llama"), tokenizer, {"": "Q4_1", "attn_output": "TQ1_0"})
    with pytest.raises(Unsupported, match=r"blk\.0\.attn_output\.weight is TQ1_0, expected one of Q4_0"):
        import_gguf(file, tmp_path / "base", progress=False)
    assert not (tmp_path / "base").exists()


def test_a_file_without_quantized_linears_is_refused(tokenizer, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", make_model("llama"), tokenizer, "F16")
    with pytest.raises(QALoraError, match="holds no quantized linear"):
        import_gguf(file, tmp_path / "base", progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, t: f["general.architecture"].__setitem__(0, "mamba"), "of architecture 'mamba', expected one of"),
        (lambda f, t: f.pop("llama.block_count"), "has no llama.block_count"),
        (lambda f, t: f["llama.block_count"].__setitem__(0, 1 << 30), "layers, 4 heads for 256 channels cannot be"),
        (lambda f, t: f["llama.block_count"].__setitem__(0, 1), "holds blk.1.* which LlamaForCausalLM has not"),
        (lambda f, t: f["llama.attention.head_count"].__setitem__(0, 0), "head_count is 0, expected 1"),
        (lambda f, t: f["llama.attention.key_length"].__setitem__(0, 32), "keys and values of different sizes"),
        (lambda f, t: f["tokenizer.ggml.pre"].__setitem__(0, "elvish"), "cuts words as 'elvish' does, .*tokenizer="),
        (lambda f, t: f["tokenizer.ggml.model"].__setitem__(0, "rwkv"), "of kind 'rwkv', expected gpt2 or llama"),
        (lambda f, t: f["tokenizer.ggml.tokens"].__setitem__(0, ["a"]), "1 tokens and 512 types|1 tokens"),
        (lambda f, t: t.pop("blk.0.ffn_up.weight"), "lacks blk.0.ffn_up.weight"),
        (lambda f, t: t["blk.0.ffn_up.weight"][0].__setitem__((0, slice(0, 2)), 255), "ffn_up.weight holds NaN or Inf"),
        (lambda f, t: t["blk.0.attn_norm.weight"][0].__setitem__(0, np.inf), "attn_norm.weight holds NaN or Inf"),
        (lambda f, t: t.__setitem__("rope_freqs.weight", [np.ones(31, "f4") * 3, 0]), "is not 32 positive float32"),
        (lambda f, t: t.__setitem__("rope_freqs.weight", [np.ones(32, "f4") * 3, 0]), "not Llama 3's. Pass"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_should_be_is_refused_in_a_line(q4_1, change, message, tmp_path):
    file = rewritten(q4_1[0], tmp_path / "edited.gguf", change)
    with pytest.raises(QALoraError, match=message) as raised:
        import_gguf(file, tmp_path / "base", progress=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "base").exists()


def test_tokens_are_as_many_as_the_model_has(q4_1):
    assert len(GgufFile.open(q4_1[0]).value("tokenizer.ggml.tokens", list)) == VOCABULARY
