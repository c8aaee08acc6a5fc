"""A tokenizer crosses into GGUF and back: llama.cpp cuts every text as Hugging Face's tokenizers do."""

import json

import gguf
import pytest
from support.gguf_files import VOCABULARY, make_model, make_sentencepiece, make_tokenizer, rewritten, write_gguf
from support.llama_cpp import LlamaCpp
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf import pretokenizers
from qalora_plugin.formats.gguf.reading import GgufFile
from qalora_plugin.formats.gguf.tokenizer import rebuild_tokenizer
from qalora_plugin.formats.gguf.vocabulary import vocabulary

TEXTS = (
    "It costs 12345 €, don't  you\n\n think?",
    "  Two  spaces, \ttabs\t\tand\r\n lines \n\n\n   end   ",
    "WE'LL see: 3.14159, 100000 naïve Größen, Ελληνικά 漢字 русский 🙂!!!",
    "def f(x):\n    return x**2  # a_b-c/d\n",
    "a</s>b <s> c",
)


def stages(name: str):
    """tokenizers' own objects for what the table writes down as JSON."""
    known = pretokenizers.PRETOKENIZERS[name]
    content = json.loads(Tokenizer.from_str('{"model":{"type":"BPE","vocab":{},"merges":[]}}').to_str())
    return Tokenizer.from_str(json.dumps(content | {"pre_tokenizer": known.as_json()})).pre_tokenizer, known


def in_llama_cpp(folder, tokenizer):
    """A small model with ``tokenizer``'s vocabulary, made by :func:`vocabulary`; the file."""
    tokenizer.save_pretrained(folder / "tokenizer")
    keys = vocabulary(folder / "tokenizer", VOCABULARY)
    plain = write_gguf(folder / "plain.gguf", make_model("llama"), make_tokenizer(), "F16")

    def replace(fields, _tensors):
        for key in [key for key in fields if key.startswith("tokenizer.")]:
            del fields[key]
        kinds = gguf.GGUFValueType
        for key, value in keys.items():
            if isinstance(value, list):
                fields[key] = [value, [kinds.ARRAY, kinds.get_type(value[0])]]
            else:
                fields[key] = [value, [kinds.UINT32 if type(value) is int else kinds.get_type(value)]]

    return rewritten(plain, folder / "model.gguf", replace)


def assert_same_tokens(file, tokenizer):
    with LlamaCpp(file) as model:
        for text in TEXTS:
            assert model.tokenize(text) == tokenizer(text)["input_ids"], text
    rebuilt = rebuild_tokenizer(GgufFile.open(file))
    for text in TEXTS:
        assert rebuilt(text)["input_ids"] == tokenizer(text)["input_ids"], text
        assert rebuilt.decode(rebuilt(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (rebuilt.bos_token_id, rebuilt.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", pretokenizers.PRETOKENIZERS)
def test_every_way_to_cut_words(name, bos, tmp_path):
    stage, known = stages(name)
    tokenizer = make_tokenizer(stage, bos, ignore_merges=known.ignore_merges)
    if known.normalizer:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    file = in_llama_cpp(tmp_path, tokenizer)
    assert GgufFile.open(file).value("tokenizer.ggml.pre", str) == name
    assert_same_tokens(file, tokenizer)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix, tmp_path):
    tokenizer = make_sentencepiece(prefix)
    file = in_llama_cpp(tmp_path, tokenizer)
    assert GgufFile.open(file).value("tokenizer.ggml.model", str) == "llama"
    assert_same_tokens(file, tokenizer)


def test_a_chat_template_and_added_tokens_come_along(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["qalora"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    file = in_llama_cpp(tmp_path, tokenizer)
    rebuilt = rebuild_tokenizer(GgufFile.open(file))
    assert rebuilt.chat_template == tokenizer.chat_template
    with LlamaCpp(file) as model:
        assert (
            model.tokenize("a qalora b") == tokenizer("a qalora b")["input_ids"] == rebuilt("a qalora b")["input_ids"]
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Whitespace()), "cuts words in a way"),
        (lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase()), "cuts words in a way"),
        (lambda t: t.add_tokens([f"more{i}" for i in range(100)]), "the tokenizer has 580 tokens, the model 512"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(change, reason, tmp_path):
    tokenizer = make_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=f"{reason}.*--like BASE.gguf"):
        vocabulary(tmp_path, VOCABULARY)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="no tokenizer can be loaded"):
        vocabulary(tmp_path, VOCABULARY)


def test_known_names_are_the_words_of_real_tokenizers():
    """The expressions as meta-llama/Llama-3 and Qwen2 publish them in tokenizer.json."""
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    assert pretokenizers.by_name("llama-bpe").steps[0]["pattern"]["Regex"] == llama3
    assert pretokenizers.by_name("qwen2").steps[0]["pattern"]["Regex"] == llama3.replace(r"\p{N}{1,3}", r"\p{N}")
    assert pretokenizers.by_name("unheard-of") is None


def test_the_saved_tokenizer_is_the_rebuilt_one(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    rebuilt = rebuild_tokenizer(GgufFile.open(in_llama_cpp(tmp_path, tokenizer)))
    rebuilt.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [loaded(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
