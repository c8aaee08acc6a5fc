"""A model folder's tokenizer → the vocabulary of a GGUF file, or the reason why llama.cpp would cut text otherwise.

llama.cpp knows two kinds of the supported models' vocabularies: byte-level BPE, cut into words by a rule that the file
only names (:mod:`.pretokenizers`), and SentencePiece's BPE, which merges by the tokens' scores.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf import pretokenizers, require_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIKE = "Pass a GGUF of the same model to copy the vocabulary from: --like BASE.gguf."
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_NEVER_MERGED = -1e9  # the score of what no merge makes


def vocabulary(folder: Path, size: int) -> dict[str, Any]:
    """The keys ``tokenizer.…`` of the metadata.

    Args:
        size: ``vocab_size`` of the model: tokens beyond the tokenizer's are filled up.

    Raises:
        Unsupported: no such tokenizer, or one that llama.cpp does not know.
    """
    tokenizer = _load(folder)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE":
        raise Unsupported(f"{folder} has a {content['model']['type']} tokenizer, expected BPE.", _LIKE)
    tokens, types = _tokens(tokenizer, content, size)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    if content["model"].get("byte_fallback"):
        found = _sentencepiece(folder, content, tokens, types, merges)
    else:
        found = _byte_level(folder, content, merges)
    found |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for role, key in _ROLES.items():
        if (token := getattr(tokenizer, f"{role}_token_id")) is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = token
    ids = tokenizer("a")["input_ids"]
    found["tokenizer.ggml.add_bos_token"] = len(ids) > 1 and ids[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return found | ({"tokenizer.chat_template": template} if template else {})


def _load(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever tokenizers of any kind and age raise
        raise Unsupported(f"no tokenizer can be loaded from {folder} ({error}).", _LIKE) from error
    if not tokenizer.is_fast:
        raise Unsupported(f"the tokenizer of {folder} has no tokenizer.json.", _LIKE)
    return tokenizer


def _tokens(tokenizer: "PreTrainedTokenizerBase", content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    kinds = require_gguf().TokenType
    by_id = {i: token for token, i in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    if len(tokenizer) > size:
        raise Unsupported(f"the tokenizer has {len(tokenizer)} tokens, the model {size}.", _LIKE)
    byte_fallback = content["model"].get("byte_fallback")
    tokens, types = [], []
    for i in range(size):
        token = added[i]["content"] if i in added else by_id.get(i)
        if token is None:
            kind, token = kinds.UNUSED, f"[PAD{i}]"
        elif i in added:
            kind = kinds.CONTROL if added[i]["special"] else kinds.USER_DEFINED
        elif byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = kinds.BYTE
        else:
            kind = kinds.NORMAL
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _byte_level(folder: Path, content: dict[str, Any], merges: list[list[str]]) -> dict[str, Any]:
    name = pretokenizers.name_of(content)
    if name is None:
        raise Unsupported(
            f"the tokenizer of {folder} cuts words in a way that has no name in llama.cpp known here.", _LIKE
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def _sentencepiece(
    folder: Path, content: dict[str, Any], tokens: list[str], types: list[int], merges: list[list[str]]
) -> dict[str, Any]:
    prefix = _space_prefix(content)
    if prefix is None:
        raise Unsupported(f"the tokenizer of {folder} treats spaces in a way that llama.cpp does not know.", _LIKE)
    kinds = require_gguf().TokenType
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    scores = [
        float(-rank[token]) if token in rank else _NEVER_MERGED if len(token) > 1 and kind == kinds.NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _space_prefix(content: dict[str, Any]) -> bool | None:
    """Whether a space is put before the text; None for a tokenizer that is not SentencePiece's."""
    stages = _stages(content["normalizer"], "normalizers") + _stages(content["pre_tokenizer"], "pretokenizers")
    kinds = [stage["type"] for stage in stages]
    metaspace = next((stage for stage in stages if stage["type"] == "Metaspace"), None)
    if metaspace:
        return metaspace.get("prepend_scheme") != "never" if kinds == ["Metaspace"] else None
    if kinds in (["Prepend", "Replace"], ["Replace"], ["Replace", "Split"]):
        return kinds[0] == "Prepend"
    return None


def _stages(stage: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return stage.get(key, [stage]) if stage else []
