"""JSON files of a model folder, read with errors that name the file."""

import json
import math
from pathlib import Path
from typing import Any

from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line

_LONGEST_JSON = 256 << 20  # bytes; the index of the largest models takes some 10 MB


@os_errors_in_one_line()
def read_json(path: Path) -> dict:
    """Read a JSON object, with an error that names the file."""
    if not path.is_file():
        raise QALoraError(f"{path.parent} has no {path.name}. Pass a Hugging Face model folder.")
    if path.stat().st_size > _LONGEST_JSON:
        raise QALoraError(f"{path} has {path.stat().st_size} bytes: that is no config. Download or copy it again.")
    return parse_json(path.read_bytes(), path)


def write_json(path: Path, content: dict) -> None:
    """As Hugging Face writes its configs, keys in their order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def strict_json(content: Any) -> str:
    """For other programs: NaN and Inf, which JSON does not have, as null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def short(value: Any) -> str:
    """A value out of a file, for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}…"


def parse_json(text: bytes, path: Path) -> dict:
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise QALoraError(f"{path} is nested too deep. Download or copy it again.") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, numbers of thousands of digits, repeated keys
        raise QALoraError(f"{path} is not valid JSON ({error}). Download or copy it again.") from error
    if not isinstance(content, dict):
        raise QALoraError(f"{path} holds {short(content)}, expected a JSON object. Download or copy it again.")
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):  # readers differ in which value they take
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {short(next(name for name in names if names.count(name) > 1))} is there twice")
    return content
