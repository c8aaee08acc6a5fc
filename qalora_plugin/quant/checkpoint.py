"""A safetensors model folder, opened without loading it: files, tensor headers, config. Refuses what is damaged.

Needs neither transformers nor a model class: merge, verify, inspect and the loader all see a checkpoint through this.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import QALoraError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is, from the file's header."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Checkpoint:
    """A model folder and the headers of its shards.

    Attributes:
        folder: the (resolved) folder.
        config: content of ``config.json``.
        tensors: name → :class:`TensorInfo`, for every tensor of the model.
        files: names of the shards, in index order.
    """

    folder: Path
    config: dict
    tensors: dict[str, TensorInfo]
    files: list[str]

    @classmethod
    def open(cls, path: str | Path, revision: str | None = None) -> "Checkpoint":
        """Open a local folder, or a Hub id (downloaded to the Hub cache).

        Raises:
            QALoraError: not a model folder, pickled weights, a missing, truncated or misplaced shard, a bad index.
        """
        folder = resolve(path, revision)
        config = read_json(folder / "config.json")
        files, listed = _shards(folder)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            handle = open_shard(folder / file)
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                piece = handle.get_slice(name)
                tensors[name] = TensorInfo(file, piece.get_dtype(), tuple(piece.get_shape()))
        if listed is not None:
            for name, file in listed.items():
                if name not in tensors or tensors[name].file != file:
                    raise QALoraError(
                        f"{folder / INDEX_NAME} says that {file} holds the tensor {name!r}, but it does not. "
                        "Download or copy the checkpoint again."
                    )
            tensors = {name: info for name, info in tensors.items() if name in listed}
        return cls(folder, config, tensors, files)

    def tensor(self, name: str) -> Tensor:
        """Load one tensor, as stored. The shard is mapped for this tensor alone: memory does not grow with use."""
        return open_shard(self.folder / self.tensors[name].file).get_tensor(name)

    @cached_property
    def quantization(self) -> dict:
        """``quantization_config`` of the model, ``{}`` for a dense one."""
        return self.config.get("quantization_config") or {}

    @property
    def method(self) -> str | None:
        """``quant_method``, or None for a dense checkpoint."""
        return self.quantization.get("quant_method")

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum((self.folder / file).stat().st_size for file in self.files)


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """Local folder as it is; anything that looks like a Hub id through the Hub cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists():
        raise QALoraError(f"{path} is a file, expected a model folder. Pass the folder that holds config.json.")
    text = str(path)
    if text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise QALoraError(f"the folder {path} does not exist. Pass a local model folder or a Hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise QALoraError(
            f"{path!r} is no local folder, and fetching it from the Hub failed: {error}. "
            "Check the spelling, your connection, and access rights."
        ) from error


def read_json(path: Path) -> dict:
    """Read a JSON object, with an error that names the file."""
    if not path.is_file():
        raise QALoraError(f"{path.parent} has no {path.name}. Pass a Hugging Face model folder.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QALoraError(f"{path} is not valid JSON ({error}). Download or copy it again.") from error


def open_shard(path: Path):
    """``safe_open`` with errors that name the file and what is wrong with it."""
    if not path.is_file():
        raise QALoraError(
            f"the shard {path.name} is missing from {path.parent}. Download or copy the checkpoint again."
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise QALoraError(
            f"{path} is truncated or damaged ({path.stat().st_size} bytes on disk; {error}). "
            "Download or copy the file again."
        ) from error


def _shards(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Shard names, and the index's ``weight_map`` if there is an index."""
    if (folder / SINGLE_NAME).is_file():  # transformers, too, prefers the single file over an index
        return [SINGLE_NAME], None
    if (folder / INDEX_NAME).is_file():
        listed = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise QALoraError(f"{folder / INDEX_NAME} has no weight_map. Download or copy it again.")
        for file in listed.values():
            if not isinstance(file, str) or file != Path(file).name or not file.endswith(".safetensors"):
                raise QALoraError(
                    f"{folder / INDEX_NAME} names the file {file!r}: shards must be .safetensors files inside the "
                    "folder itself. Do not use a checkpoint from a source you do not trust."
                )
        return list(dict.fromkeys(listed.values())), listed
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise QALoraError(
            f"{folder} holds pickled weights ({', '.join(pickles[:3])}), which can run code when opened and are never "
            "read. Use or make a safetensors version of this checkpoint."
        )
    raise QALoraError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}. Pass a folder with safetensors weights.")
