"""Where a model folder is: a path here, or an id of the Hub."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qalora_plugin.core.errors import QALoraError

_HUB_PATTERNS = [
    "*.safetensors", "*.json", "*.txt", "*.model", "*.model.v*", "*.jinja", "*.tiktoken", "*.py", "LICENSE*",
    "LICENCE*", "License*", "license*", "NOTICE*", "Notice*", "COPYING*", "USE_POLICY*",
]  # fmt: skip


def is_local(path: str | Path) -> bool:
    """Whether this is a folder here; else :func:`resolve` takes it for a Hub id. (``""`` is none, though to
    pathlib it is the working directory.)"""
    return path != "" and expanded(path).is_dir()


def is_hub_id(name: str | Path) -> bool:
    """Whether :func:`resolve` asks the Hub for it: no path that is there, nor one that only a folder could have."""
    text = str(name)
    return bool(text) and not (expanded(name).exists() or text.startswith(("/", ".", "~")) or text.count("/") > 1)


def require_use_of_revision(revision: str | None, names: Iterable[str | Path | None]) -> None:
    """Refuse a revision where none of the models comes from the Hub: it would change nothing. (``None``: a name that
    is found later, in an adapter's folder.)"""
    if revision is not None and all(name is not None and is_local(name) for name in names):
        raise QALoraError(
            f"--revision {revision} is of a Hub id, but every model is a folder here: it changes nothing. Leave it "
            "out, or pass the Hub id."
        )


def expanded(path: str | Path) -> Path:
    """``path`` with the home of ``~`` in it."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise QALoraError(f"{path}: {error} Write the folder out.") from error


def fetch_config(name: str, revision: str | None = None, what: str = "base_model") -> Path:
    """``config.json`` of a Hub id, without the weights. ``what``: the key that names it, for the error."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise QALoraError(
            f"{what} {name!r} is no local folder, and its config.json cannot be had from the Hub: {error}. "
            "Check the spelling, your connection, and access rights."
        ) from error


def resolve(path: str | Path, revision: str | None = None, **hub: Any) -> Path:
    """Local folder as it is; anything that looks like a Hub id through the Hub cache.

    Args:
        hub: passed to ``huggingface_hub.snapshot_download`` (``token``, ``cache_dir`` …).
    """
    if path == "":
        raise QALoraError("the name of a model is empty. Pass a local model folder or a Hub id (owner/name).")
    folder = expanded(path)
    if is_local(path):
        return folder.resolve()
    if folder.exists():
        raise QALoraError(f"{path} is a file, expected a model folder. Pass the folder that holds config.json.")
    if not is_hub_id(path):
        raise QALoraError(f"the folder {path} does not exist. Pass a local model folder or a Hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=_HUB_PATTERNS, **hub))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise QALoraError(
            f"{str(path)!r} is no local folder, and fetching it from the Hub failed: {error}. "
            "Check the spelling, your connection, and access rights."
        ) from error
