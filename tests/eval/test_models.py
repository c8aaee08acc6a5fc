"""What is opened for a name that a user gives."""

import json
import shutil

import pytest

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.models import Subject


def test_an_adapter_whose_base_is_elsewhere(adapter, base, tmp_path):
    """Its path may be relative, of another folder; and the base was said to be missing as if it had been named."""
    moved = shutil.copytree(adapter, tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "./base"}))
    with pytest.raises(QALoraError) as error:
        Subject.open(str(moved))
    assert f"(The adapter {moved} names this base; BASE+{moved} names another.)" in str(error.value)
    with pytest.raises(QALoraError, match="is no folder, and neither is"):
        Subject.open(f"{base}+{tmp_path}/none")
    with pytest.raises(QALoraError) as error:
        Subject.open(f"./base+{moved}")
    assert "names this base" not in str(error.value)  # the user does
