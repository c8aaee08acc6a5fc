"""Folders as AutoGPTQ and AutoAWQ wrote them until 2023, and the Hub is full of.

The settings stand in a file of their own alone, and AutoGPTQ's weights have names of their own
(``gptq_model-4bit-128g.safetensors``, or shards with ``gptq_model-4bit-128g.safetensors.index.json``).
"""

from pathlib import Path

from qalora_plugin.checkpoint.json_files import read_json

SETTINGS_NAME = "quantize_config.json"
SETTINGS = {SETTINGS_NAME: "gptq", "quant_config.json": "awq"}  # by file: the method, which neither names
_INDEX_SUFFIX = ".safetensors.index.json"


def read_settings(path: Path) -> dict:
    """What ``config.json`` would hold of such a file: each tool knew one method only."""
    return {"quant_method": SETTINGS[path.name], **read_json(path)}


def find_weights(folder: Path, base_name: str | None = None) -> str | None:
    """The one file of weights in ``folder``, or their one index, whatever its name; None if there are several.

    Args:
        base_name: ``model_file_base_name`` of the settings, which decides between several.
    """
    for suffix in (_INDEX_SUFFIX, ".safetensors"):
        found = sorted(path.name for path in folder.glob(f"*{suffix}"))
        if base_name and f"{base_name}{suffix}" in found:
            return f"{base_name}{suffix}"
        if len(found) == 1:
            return found[0]
        if found and suffix == _INDEX_SUFFIX:
            return None
    return None


def is_index(name: str) -> bool:
    return name.endswith(_INDEX_SUFFIX)
