"""The files beside the weights of a base or a merged checkpoint: tokenizer, generation config, licence …

Copied is what is known to belong to a model, never what else lies in the folder: logs, keys, a run's state.
"""

import logging
import math
import shutil
from fnmatch import fnmatch
from pathlib import Path

from qalora_plugin.checkpoint.json_files import read_json, write_json
from qalora_plugin.core.errors import printable

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_CONFIG, _TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
_TOKENIZER_FILES = (
    "tokenizer*.json", _TOKENS_MAP, "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "*.model", "*.model.v*", "tekken.json", "chat_template*.json", "*.jinja",
)  # fmt: skip
_PROCESSOR_FILES = ("*processor_config.json",)
_OTHER_FILES = (
    GENERATION_CONFIG, "LICENSE*", "LICENCE*", "License*", "license*", "NOTICE*", "Notice*", "COPYING*",
    "USE_POLICY*", "modeling_*.py", "configuration_*.py", "tokenization_*.py", "tokenizer_*.py", "processing_*.py",
    "*_processing_*.py", "feature_extraction_*.py",
)  # fmt: skip
_NAMED_TEMPLATES = "additional_chat_templates"  # a folder, as transformers writes it
_CODE_FILES = ("*.py",)  # all of a model that has its own: the files import one another
_LARGEST = 256 << 20  # bytes; the largest tokenizers take 40 MB
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


def copy_companions(base: Path, adapter: Path, work: Path) -> None:
    """Tokenizer, generation config, licence … of the base; the training run's tokenizer or processor if it saved one.

    Never a mixture of two tokenizers: transformers 4 wrote files that 5 does not, and they overrule the others.
    """
    trained: tuple[str, ...] = _TOKENIZER_FILES if _has_tokenizer(adapter) else ()
    if any(_is_any_of(path, _PROCESSOR_FILES) for path in adapter.iterdir()):
        trained += _PROCESSOR_FILES
    known: tuple[str, ...] = _TOKENIZER_FILES + _PROCESSOR_FILES + _OTHER_FILES
    if read_json(work / "config.json").get("auto_map"):
        known += _CODE_FILES
    for path in base.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in known) and not _is_any_of(path, trained):
            _copy_companion(path, base, work)
    for path in adapter.iterdir():
        if _is_any_of(path, trained):
            _copy_companion(path, adapter, work)
    named = (adapter if _has_tokenizer(adapter) else base) / _NAMED_TEMPLATES
    for path in named.glob("*.jinja"):
        (work / _NAMED_TEMPLATES).mkdir(exist_ok=True)
        _copy_companion(path, named.parent, work / _NAMED_TEMPLATES)


def _copy_companion(path: Path, folder: Path, work: Path) -> None:
    if path.name.startswith(".") or not path.is_file():
        return
    why_not = None
    if path.resolve().parent not in {*_own_places(folder.resolve()), folder.resolve() / _NAMED_TEMPLATES}:
        why_not = "it is a link that leads out of its folder. Put the file itself there if it belongs to the model"
    elif path.stat().st_size > _LARGEST:
        why_not = f"it has {path.stat().st_size / 1e6:.0f} MB"
    if why_not:
        logger.warning("qalora: %s is not copied into the new checkpoint: %s.", printable(path), why_not)
    else:
        shutil.copyfile(path, work / path.name)


def _own_places(folder: Path) -> set[Path]:
    """Where a model folder's files may lie: in it, or, in the Hub's cache, among the blobs that its links lead to."""
    return {folder, folder.parents[1] / "blobs"} if folder.parent.name == "snapshots" else {folder}


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
        logger.warning(
            "BOS, EOS and PAD in config.json stay the base's: a tokenizer cannot be loaded (%s)", printable(error)
        )
        return
    changed = {key: token for key, token in after.items() if token is not None and token != before.get(key)}
    vocabulary = read_json(work / "config.json").get("vocab_size")
    vocabulary = vocabulary if isinstance(vocabulary, int) else math.inf
    if beyond := {key: token for key, token in changed.items() if token >= vocabulary}:
        logger.warning("the tokenizer has %s, beyond the model's %d tokens: the base's stay", beyond, vocabulary)
        changed = {key: token for key, token in changed.items() if key not in beyond}
    for path in (work / "config.json", work / GENERATION_CONFIG):
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
