"""The vocabulary in a GGUF file → a Hugging Face tokenizer, or the check that a given one is the same.

Rebuilt are the two kinds that the supported models have: byte-level BPE (``gpt2``: tokens and merges) and
SentencePiece's BPE (``llama``: tokens and scores). transformers has converters of its own, but they take EOS for BOS,
cut every vocabulary as GPT-2's, and make Gemma's a unigram model: other tokens than llama.cpp's on ordinary text.
"""

from typing import TYPE_CHECKING, Any

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.gguf import pretokenizers
from qalora_plugin.formats.gguf.reading import GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # gguf.TokenType
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_SPACE = "▁"  # SentencePiece's
_PASS_ONE = "Pass the original model's tokenizer: tokenizer=FOLDER_OR_ID."


def load_tokenizer(source: str, file: GgufFile) -> "PreTrainedTokenizerBase":
    """A tokenizer from a folder or Hub id, held against the vocabulary of the file.

    Raises:
        QALoraError: it cannot be loaded, or has other tokens.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever tokenizers of any kind and age raise
        raise QALoraError(f"no tokenizer can be loaded from {source} ({error}).") from error
    require_same_vocabulary(tokenizer, file, source)
    return tokenizer


def rebuild_tokenizer(file: GgufFile) -> "PreTrainedTokenizerBase":
    """The tokenizer that the file describes.

    Raises:
        QALoraError: its kind, or its way to cut words, is not known.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    kind, tokens = file.value("tokenizer.ggml.model", str), _tokens(file)
    types = list(_types(file))
    while types and types[-1] == _UNUSED:  # they only fill the embedding up
        types.pop()
    tokens = tokens[: len(types)]
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise QALoraError(f"{file.path}: its vocabulary is of kind {short(kind)}, expected gpt2 or llama. {_PASS_ONE}")
    names = {f"{role}_token": _special(file, tokens, key) for role, key in _ROLES.items()}
    try:
        built = Tokenizer.from_str(_json(builders[kind](file, tokens) | _added(file, tokens, names)))
    except Exception as error:  # tokenizers raises nothing narrower
        raise QALoraError(f"{file.path}: its vocabulary makes no tokenizer ({error}). {_PASS_ONE}") from error
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=built,
        clean_up_tokenization_spaces=False,
        chat_template=file.value("tokenizer.chat_template", str, None),
        **{role: token for role, token in names.items() if token is not None},
    )
    require_same_vocabulary(tokenizer, file, "the tokenizer rebuilt from it")
    return tokenizer


def require_same_vocabulary(tokenizer: "PreTrainedTokenizerBase", file: GgufFile, source: str) -> None:
    """Refuse a tokenizer that numbers its tokens otherwise than the file does. Padding at the end may be missing."""
    stored, types = _tokens(file), _types(file)
    found: Any = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), len(stored)))))
    for i, token in enumerate(found):  # None for ids that are not used
        if token is not None and token != stored[i] and not _same_token(token, stored[i]):
            raise QALoraError(
                f"{source} is not the tokenizer of {file.path}: token {i} is {short(token)}, the file has "
                f"{short(stored[i])}. {_PASS_ONE}"
            )
    real = max((i for i, kind in enumerate(types) if kind == 1), default=-1) + 1
    if not real <= len(tokenizer) <= len(stored):
        raise QALoraError(
            f"{source} is not the tokenizer of {file.path}: it has {len(tokenizer)} tokens, the file {len(stored)}. "
            f"{_PASS_ONE}"
        )


def _same_token(token: str, stored: str) -> bool:
    """Whether they differ only in how a space, or a tab, is written."""
    return token.replace(_SPACE, " ") == stored.replace(_SPACE, " ") or (token, stored) == ("\t", "<0x09>")


def _tokens(file: GgufFile) -> list[str]:
    tokens = file.value("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise QALoraError(f"{file.path} has no list of tokens. {_PASS_ONE}")
    return tokens


def _types(file: GgufFile) -> list[int]:
    types = file.value("tokenizer.ggml.token_type", list, None)
    count = len(_tokens(file))
    if types is None:
        return [1] * count
    if len(types) != count:
        raise QALoraError(f"{file.path} has {count} tokens and {len(types)} types of them. {_PASS_ONE}")
    return types


def _special(file: GgufFile, tokens: list[str], key: str) -> str | None:
    found = file.value(f"tokenizer.ggml.{key}_token_id", int, None)
    return tokens[found] if found is not None and 0 <= found < len(tokens) else None


def _json(content: dict[str, Any]) -> str:
    import json

    return json.dumps({"version": "1.0", "truncation": None, "padding": None, **content})


def _added(file: GgufFile, tokens: list[str], names: dict[str, str | None]) -> dict[str, Any]:
    """Tokens that are found in the text before anything else, and those put around it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": tokens[i], "special": kind == _CONTROL, **flags}
        for i, kind in enumerate(_types(file))
        if kind in (_CONTROL, _USER_DEFINED) and tokens[i]
    ]
    known = pretokenizers.by_name(file.value("tokenizer.ggml.pre", str, "default"))
    first = known.adds_bos if file.value("tokenizer.ggml.model", str) == "gpt2" and known else True
    adds = {
        role: file.value(f"tokenizer.ggml.add_{role}_token", bool, default) and names[f"{role}_token"]
        for role, default in (("bos", first), ("eos", False))
    }
    if not any(adds.values()):
        return {"added_tokens": added, "post_processor": None}
    special = {
        token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in adds.values() if token
    }

    def template(*sequences: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for i, name in enumerate(sequences):
            before, after = (
                [{"SpecialToken": {"id": adds[role], "type_id": i}}] if adds[role] else [] for role in adds
            )
            parts += [*before, {"Sequence": {"id": name, "type_id": i}}, *after]
        return parts

    processor = {"type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B")}
    return {"added_tokens": added, "post_processor": {**processor, "special_tokens": special}}


def _byte_level(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    name = file.value("tokenizer.ggml.pre", str, "default")
    known = pretokenizers.by_name(name)
    if known is None:
        raise QALoraError(f"{file.path} cuts words as {short(name)} does, which is not known here. {_PASS_ONE}")
    pairs = [merge.split(" ") for merge in file.value("tokenizer.ggml.merges", list)]
    return {
        "normalizer": {"type": known.normalizer} if known.normalizer else None,
        "pre_tokenizer": known.as_json(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, pairs, ignore_merges=known.ignore_merges),
    }


def _sentencepiece(file: GgufFile, tokens: list[str]) -> dict[str, Any]:
    scores = file.value("tokenizer.ggml.scores", list)
    if len(scores) != len(_tokens(file)):
        raise QALoraError(f"{file.path} has {len(_tokens(file))} tokens, {len(scores)} scores of them. {_PASS_ONE}")
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = file.value("tokenizer.ggml.add_space_prefix", bool, True)
    normalizers = [{"type": "Prepend", "prepend": _SPACE}] * prefix + [space]
    back = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix),
    ]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(
            tokens, _merges(tokens, scores, _types(file)), byte_fallback=True, fuse_unk=True,
            unk_token=_special(file, tokens, "unknown"),
        ),
    }  # fmt: skip


def _bpe(tokens: list[str], merges: list[list[str]], **settings: Any) -> dict[str, Any]:
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
    }  # fmt: skip
    vocabulary: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocabulary.setdefault(token, i)
    return {**model, **settings, "vocab": vocabulary, "merges": merges}


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[list[str]]:
    """Every way to put two tokens together that gives a third, best score first, as SentencePiece merges."""
    ordinary = {
        token: score
        for token, score, kind in zip(tokens, scores[: len(tokens)], types[: len(tokens)], strict=True)
        if kind in (1, _USER_DEFINED)
    }
    merges = [
        (-score, [token[:at], token[at:]])
        for token, score in ordinary.items()
        for at in range(1, len(token))
        if token[:at] in ordinary and token[at:] in ordinary
    ]
    merges.sort(key=lambda merge: merge[0])
    return [pair for _, pair in merges]
