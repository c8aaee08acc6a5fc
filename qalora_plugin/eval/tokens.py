"""Real token sequences to compare models on: from the dataset in training, a text file, or Python's own docs."""

import json
import pydoc
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from qalora_plugin.checkpoint.hub import expanded
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line

SEQUENCE_LENGTH = 256
ENCODING = "utf-8-sig"  # with or without the mark that Windows' editors begin a file with
_SAMPLE = "Held out, 12. Привет, 你好"  # every tokenizer knows some of it
_ID_COLUMNS = ("input_ids", "chosen_ids", "chosen_input_ids", "prompt_ids", "prompt_input_ids")
_CHATS = ("messages", "conversations")  # whose messages hold "content", or "value"
_TEXTS = ("text", "content")
_LINES_SUFFIXES = (".jsonl", ".ndjson")
_DATA_SUFFIXES = (".json", ".parquet", ".arrow", ".csv", ".tsv")
_DOCUMENTED = (
    "argparse",
    "asyncio",
    "collections",
    "datetime",
    "decimal",
    "email",
    "itertools",
    "json",
    "logging",
    "re",
)


def sample_dataset(dataset: Iterable[Any] | None, max_tokens: int) -> list[list[int]]:
    """First sequences of a tokenised dataset, up to ``max_tokens`` in all; ``[]`` if its rows hold no known ids."""
    sequences, total = [], 0
    for row in islice(dataset or (), max_tokens):
        columns = row if isinstance(row, Mapping) else {}
        ids = next((columns[name] for name in _ID_COLUMNS if columns.get(name) is not None), None)
        if ids is None or total >= max_tokens:
            break
        try:
            sequence = [int(token) for token in ids][: max_tokens - total]
        except (TypeError, ValueError, RuntimeError):  # rows of a kind of their own, as batches
            break
        if len(sequence) > 1:
            sequences.append(sequence)
            total += len(sequence)
    return sequences


def is_text_file(text: str) -> bool:
    """Whether this names a file here, there or not; else it is a dataset of the Hub."""
    return expanded(text).exists() or text.lower().endswith((".txt", ".md", *_LINES_SUFFIXES))


@os_errors_in_one_line()
def read_texts(path: str | Path) -> list[str]:
    """Texts of a local file: ``.jsonl`` line by line (see :func:`joined_text`), else the file as one text.

    Raises:
        QALoraError: no such file, empty, or not JSON lines.
    """
    path = expanded(path)
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise QALoraError(f"the text file {path} {found}. Pass a .txt or .jsonl file.")
    suffix = path.suffix.lower()
    if suffix in _DATA_SUFFIXES:
        raise QALoraError(f"{path} holds data, not text. Pass a .txt file, or a .jsonl file with a JSON value a line.")
    try:
        content = path.read_text(encoding=ENCODING)
    except UnicodeDecodeError as error:
        raise QALoraError(f"{path} is not UTF-8 text ({error}). Pass a .txt or .jsonl file.") from error
    if suffix not in _LINES_SUFFIXES:
        texts = [content]
    else:
        try:
            rows = [parse_line(line) for line in content.split("\n") if line.strip()]  # splitlines cuts inside of texts
            texts = [joined_text(row) for row in rows]
        except (ValueError, RecursionError) as error:
            raise QALoraError(f"{path} is not JSON lines: {error}. Write one JSON value a line.") from error
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise QALoraError(f"{path} holds no text. Pass a file with some.")
    return texts


def parse_line(line: str) -> Any:
    """A line of JSON. Half a character (``"\\ud83d"`` without the other), which no tokenizer takes, becomes ``?``."""
    found = json.loads(line)
    if "\\ud" in line.lower():
        return json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    return found


def joined_text(row: Any) -> str:
    """The text of a row: what is said in its chat, else its ``text`` or ``content``, else every string in it, depth
    first. (Beside a chat or a text stand ids, addresses and sources.)"""
    chats = [row[key] for key in _CHATS if isinstance(row, dict) and isinstance(row.get(key), list) and row[key]]
    if chats:
        said = [message.get("content", message.get("value")) for message in chats[0] if isinstance(message, dict)]
        if texts := [text for text in said if isinstance(text, str)]:
            return "\n".join(texts)
    for key in _TEXTS:
        if isinstance(row, dict) and isinstance(row.get(key), str) and row[key].strip():
            return row[key]
    return "\n".join(_strings(row))


def _strings(row: Any) -> Iterable[str]:
    if isinstance(row, str):
        yield row
    elif isinstance(row, (dict, list)):
        for value in row.values() if isinstance(row, dict) else row:
            yield from _strings(value)


def default_texts() -> list[str]:
    """Documentation of the standard library: real text that is at hand wherever Python is."""
    return [pydoc.plain(pydoc.render_doc(name)) for name in _DOCUMENTED]


def load_tokenizer(folder: str | Path) -> Any:
    """
    Raises:
        QALoraError: transformers cannot load it, or makes one up that knows no text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        known = set(tokenizer(_SAMPLE, add_special_tokens=False).input_ids)
    except Exception as error:  # whatever tokenizers of any kind and age raise
        raise QALoraError(
            f"{folder} has no tokenizer that can be loaded ({error}). Put its tokenizer's files there."
        ) from error
    if not known - set(tokenizer.all_special_ids):
        raise QALoraError(
            f"{folder} has no tokenizer: without its files transformers makes a {type(tokenizer).__name__} of "
            f"{len(tokenizer)} tokens, which knows no text. Put its tokenizer's files there."
        )
    return tokenizer


def require_ids(sequences: Iterable[list[int]], vocabulary: int | None, model: object) -> None:
    """Refuse tokens that a model has no embedding for, which are another tokenizer's.

    Args:
        vocabulary: how many it has; None if that is not known.
    """
    if vocabulary is None:
        return
    strange = (i for ids in sequences for i in ids if not 0 <= i < vocabulary)
    if (found := next(strange, None)) is not None:
        raise QALoraError(
            f"token {found} is none of the {vocabulary} that {model} has. Use the model's own tokenizer: put its files "
            "there."
        )


def tokenize(tokenizer: Any, texts: list[str], max_tokens: int, length: int = SEQUENCE_LENGTH) -> list[list[int]]:
    """Cut texts into sequences of at most ``length`` tokens, ``max_tokens`` in all.

    Raises:
        QALoraError: no text has two tokens, of which the second could be predicted, or that few are asked for.
    """
    if max_tokens < 2:
        raise QALoraError(f"{max_tokens} tokens were asked for, expected 2 or more: the first predicts the second.")
    sequences, left = [], max_tokens
    for text in texts:
        ids = tokenizer(text[: left * 16]).input_ids
        for start in range(0, len(ids), length):
            sequence = ids[start : start + min(length, left)]
            if len(sequence) > 1:
                sequences.append(sequence)
                left -= len(sequence)
            if left < 2:
                return sequences
    if not sequences:
        raise QALoraError("no text is longer than one token, so there is nothing to predict. Pass more text.")
    return sequences
