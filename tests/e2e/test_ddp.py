"""Two processes train what one process trains, each with a whole model (DDP) or with half of one (FSDP2)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.axolotl_runs import BIN, command
from support.two_processes import launch

pytestmark = pytest.mark.e2e
SCRIPT = Path(__file__).with_name("ddp_train.py")


def test_two_processes_train_what_one_does(base, tmp_path):
    command(BIN / "python", SCRIPT, base, tmp_path / "one", "4")
    launch(SCRIPT, base, tmp_path / "two", "2")
    launch(SCRIPT, base, tmp_path / "sharded", "2", "fsdp")
    launch(SCRIPT, base, tmp_path / "one reader", "2", "one-reader")
    names = ("one", "two", "sharded", "one reader")
    one, two, *sharded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in names)
    assert all(one.keys() == other.keys() for other in (two, *sharded))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
        for other in sharded:
            torch.testing.assert_close(two[name], other[name], rtol=0, atol=1e-5)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in one.items() if "lora_B" in name)
    assert all((tmp_path / name / "merged" / "offsets.safetensors").is_file() for name in names)
