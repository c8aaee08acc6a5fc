"""The files beside the weights of a merged checkpoint: tokenizer, generation config, licence …"""

import logging
import math
import shutil
from fnmatch import fnmatch
from pathlib import Path

from .quant.checkpoint import read_json, write_json

logger = logging.getLogger(__name__)

_NOT_COPIED = {"config.json", "README.md", "quantize_config.json", "quant_log.csv"}
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".gguf",
    ".msgpack",
    ".h5",
)
_TOKENIZER_CONFIG, _TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
_TOKENIZER_FILES = (
    "tokenizer*", _TOKENS_MAP, "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*", "*.jinja",
)  # fmt: skip
_PROCESSOR_FILES = ("*processor_config.json",)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


def copy_companions(base: Path, adapter: Path, work: Path) -> None:
    """Tokenizer, generation config, licence … of the base; the training run's tokenizer or processor if it saved one.

    Never a mixture of two tokenizers: transformers 4 wrote files that 5 does not, and they overrule the others.
    """
    trained = _TOKENIZER_FILES if _has_tokenizer(adapter) else ()
    if any(_is_any_of(path, _PROCESSOR_FILES) for path in adapter.iterdir()):
        trained += _PROCESSOR_FILES
    for path in base.iterdir():
        if path.name not in _NOT_COPIED and path.name[0] != "." and not _is_any_of(path, trained):
            _copy_companion(path, work)
    for path in adapter.iterdir():
        if _is_any_of(path, trained):
            _copy_companion(path, work)


def _copy_companion(path: Path, work: Path) -> None:
    if path.is_file() and not path.name.endswith(_WEIGHTS):
        shutil.copyfile(path, work / path.name)


def _is_any_of(path: Path, patterns: tuple[str, ...]) -> bool:
    """By name; a model's own code (``tokenizer_….py``) stays with the base, training runs do not save it."""
    return path.suffix != ".py" and any(fnmatch(path.name, pattern) for pattern in patterns)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / _TOKENIZER_CONFIG).is_file()


def carry_special_tokens(base: Path, work: Path) -> None:
    """Put BOS, EOS and PAD of the merged folder's tokenizer into its configs, where the base's tokenizer has others."""
    try:
        if _stated_tokens(base) == _stated_tokens(work):
            return
        before, after = _special_token_ids(base), _special_token_ids(work)
    except Exception as error:  # whatever tokenizers of any kind and age raise
        logger.warning("BOS, EOS and PAD in config.json stay the base's: a tokenizer cannot be loaded (%s)", error)
        return
    changed = {key: token for key, token in after.items() if token is not None and token != before.get(key)}
    vocabulary = read_json(work / "config.json").get("vocab_size", math.inf)
    if beyond := {key: token for key, token in changed.items() if token >= vocabulary}:
        logger.warning("the tokenizer has %s, beyond the model's %d tokens: the base's stay", beyond, vocabulary)
        changed = {key: token for key, token in changed.items() if key not in beyond}
    for path in (work / "config.json", work / "generation_config.json"):
        if changed and path.is_file():
            config = read_json(path)
            write_json(path, config | {key: _with(config.get(key), token) for key, token in changed.items()})


def _with(found: int | list[int] | None, token: int) -> int | list[int]:
    """``token`` in place of ``found``; where a model has several ends of text, one more of them."""
    if not isinstance(found, list):
        return token
    return found if token in found else [*found, token]


def _stated_tokens(folder: Path) -> set[tuple[str, str]]:
    """BOS, EOS and PAD as the tokenizer's files give them: if these are the same, no tokenizer need be loaded."""
    paths = [folder / name for name in (_TOKENIZER_CONFIG, _TOKENS_MAP)]
    stated = [item for path in paths if path.is_file() for item in read_json(path).items()]
    return {
        (key, token["content"] if isinstance(token, dict) else token)
        for key, token in stated
        if key in _SPECIAL_TOKENS and token
    }


def _special_token_ids(folder: Path) -> dict[str, int | None]:
    """``eos_token_id`` … of the tokenizer in ``folder``, ``{}`` if there is none."""
    if not _has_tokenizer(folder):
        return {}
    from transformers import AutoTokenizer  # takes longer to import than a merge takes

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in _SPECIAL_TOKENS}
