"""The example that serves, as it stands, in a process of its own: it starts vLLM's."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.merged_checkpoints import make_merged

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_offline.py"


@pytest.mark.e2e
def test_serve_offline(tmp_path):
    folder = make_merged(tmp_path / "merged")
    command = (sys.executable, EXAMPLE, folder, "hello there", "--tokens", "4", "--max-model-len", "64")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hello there → " in done.stdout
