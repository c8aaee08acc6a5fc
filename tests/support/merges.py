"""What tests of merges share: merges that are refused, and adapters that were edited."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError

SEQUENCES = [list(range(4, 100)), list(range(60, 4, -1))]


UP_A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


def refuse(match, base, adapter, out, **options):
    with pytest.raises(QALoraError, match=match):
        merge(base, adapter, out, progress=False, **options)
    assert not Path(out).exists() or any(Path(out).iterdir())
    assert not list(Path(out).parent.glob(".*.partial-*"))


def edited(adapter, folder, tensors=None, **config):
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        weights = load_file(folder / "adapter_model.safetensors")
        tensors(weights)
        save_file(weights, folder / "adapter_model.safetensors")
    return folder
