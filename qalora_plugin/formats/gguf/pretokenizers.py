"""How text is cut into words before byte-pair merges: llama.cpp's names (``tokenizer.ggml.pre``) ↔ tokenizers'
settings.

A GGUF file holds only the name; llama.cpp knows the rules by heart. The same rules, as Hugging Face's
``tokenizer.json`` of the models writes them, are held here; what is not in this table is refused, not guessed: numbers
and spaces would be cut otherwise than the model learned, without any error. Source: llama.cpp ``llama-vocab.cpp``
(``regex_exprs``).
"""

from dataclasses import dataclass
from typing import Any

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SIGNS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SIGNS_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
_GPT2_WORDS = {**_BYTES, "use_regex": True}  # cuts by GPT-2's own expression


@dataclass(frozen=True)
class Pretokenizer:
    """Attributes:
    steps: as ``pre_tokenizer`` in ``tokenizer.json`` has them. ignore_merges: a word that is a token is that token.
    normalizer: ``NFC`` or None. adds_bos: whether llama.cpp puts BOS first where the file does not say.
    """

    steps: tuple[dict[str, Any], ...]
    ignore_merges: bool = False
    normalizer: str | None = None
    adds_bos: bool = False

    def as_json(self) -> dict[str, Any]:
        """As ``tokenizer.json`` writes it."""
        return {"type": "Sequence", "pretokenizers": list(self.steps)}


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


_LLAMA3 = (_split(rf"{_SUFFIXES}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS_AND_SPACES}"), _BYTES)
PRETOKENIZERS = {
    "gpt-2": Pretokenizer((_GPT2_WORDS,)),
    "smollm": Pretokenizer(({"type": "Digits", "individual_digits": True}, _GPT2_WORDS)),
    "llama-bpe": Pretokenizer(_LLAMA3, ignore_merges=True, adds_bos=True),
    "dbrx": Pretokenizer(_LLAMA3),  # Phi-4's
    "qwen2": Pretokenizer((_split(rf"{_SUFFIXES}|{_WORDS}|\p{{N}}|{_SIGNS_AND_SPACES}"), _BYTES), normalizer="NFC"),
    "tekken": Pretokenizer(  # Mistral Nemo's and later
        (_split(rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SIGNS_WITH_SLASH}"), _BYTES), ignore_merges=True, adds_bos=True
    ),
    "gpt-4o": Pretokenizer(  # Phi-4 mini's
        (_split(rf"{_CASED[0]}{_SUFFIXES}?|{_CASED[1]}{_SUFFIXES}?|\p{{N}}{{1,3}}|{_SIGNS_WITH_SLASH}"), _BYTES)
    ),
}  # fmt: skip
_SAME = {"default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def by_name(name: str) -> Pretokenizer | None:
    """What llama.cpp does by this name, None if that is not known here."""
    return PRETOKENIZERS.get(_SAME.get(name, name))


def name_of(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for what a ``tokenizer.json`` does, None if it has none that is known here."""
    found = _steps(tokenizer.get("pre_tokenizer"))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    ignore = bool(tokenizer["model"].get("ignore_merges"))
    for name, known in PRETOKENIZERS.items():
        if (found, normalizer, ignore) == (_comparable(known.steps), known.normalizer, known.ignore_merges):
            return name
    return None


def _steps(stage: dict[str, Any] | None) -> list[dict[str, Any]]:
    stages = stage.get("pretokenizers", [stage]) if stage else []
    return _comparable(stages)


def _comparable(stages: Any) -> list[dict[str, Any]]:
    """Without what does not change the tokens."""
    return [{key: value for key, value in stage.items() if key != "trim_offsets"} for stage in stages]
