"""Runs a script, or ``axolotl train``, as two processes on a CPU."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.axolotl_runs import BIN, ENVIRONMENT, losses, write_config
from support.fabricate import make_adapter, make_base

_SETTINGS = {
    "micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 4, "save_steps": 2, "val_set_size": None,
    "eval_steps": None, "gradient_checkpointing": False, "optimizer": "adamw_torch", "adam_epsilon": 1e-3,
    "learning_rate": 0.005, "lr_scheduler": "constant", "qalora": {"verify": False},
    "dataloader_num_workers": 0,  # none is forked beside the threads of gloo: one in some hundreds hung in fork()
}  # fmt: skip
FSDP2 = {
    "full": {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": True},
    "sharded": {
        "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False, "offload_params": True,
        "cpu_offload_pin_memory": False, "activation_checkpointing": True,
    },
}  # fmt: skip
_ADDRESS = ("--standalone", "--nproc_per_node", "2")
_PATH = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))


def launch(*arguments: str | Path, code: int = 0, timeout: int = 600) -> str:
    """Run a Python script, which finds ``support``, as two processes; returns their output, of both in one."""
    program = (BIN / "python", "-m", "torch.distributed.run", *_ADDRESS)
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _PATH}
    done = subprocess.run(
        [str(argument) for argument in (*program, *arguments)],
        capture_output=True, text=True, env=environment, timeout=timeout,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == (code != 0), output[-8000:]
    return output


def train_as_two(config: Path, **options) -> str:
    """``axolotl train``; each rank leaves a report beside the config, see :func:`report`."""
    return launch(Path(__file__).with_name("axolotl_process.py"), config, **options)


def fsdp2(kind: str, layer: str = "LlamaDecoderLayer") -> dict:
    """Settings of a kind of FSDP2 that shares out every ``layer``."""
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": layer}
    return {"fsdp_version": 2, "fsdp_config": {**wrap, "reshard_after_forward": True, **FSDP2[kind]}}


def assert_halved(config: Path) -> None:
    """Two processes trained under FSDP, and each held half of the packed bytes."""
    for rank in (0, 1):
        found = report(config, rank)
        assert (found["mode"], found["backend"], found["world"]) == ("DISTRIBUTED", "gloo", 2)
        assert found["model"].startswith("FSDP")
        assert found["here"] == found["packed"] / 2


def report(config: Path, rank: int) -> dict:
    """What a rank found when training began: ``mode``, ``backend``, ``model``, ``packed`` and ``here`` (bytes)."""
    return json.loads((config.parent / f"rank{rank}.json").read_text())


def same_training(root: Path, base: Path | None = None, **adapter_options) -> Callable[..., Path]:
    """Makes configs that differ by what they are called with; all train the same adapter on the same base and data."""
    base = base or make_base(root / "base", act_order=True, bias=True)
    adapter = make_adapter(base, root / "adapter", r=8, lora_alpha=16, **adapter_options)
    # Of one length: Axolotl has each rank average over its own tokens, which one process with all rows does not.
    rows = ({"instruction": f"say {i:03d}", "input": "", "output": f"{i * i:05d} is its square"} for i in range(64))
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "lora_model_dir": str(adapter),
        "datasets": [{"path": str(data), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(root / "prepared"),
    }

    def configure(name: str, **changes) -> Path:
        folder = root / name
        folder.mkdir(exist_ok=True)
        return write_config(folder, base, **_SETTINGS | common | changes)

    return configure


def trained(config: Path) -> dict[str, torch.Tensor]:
    return load_file(config.parent / "out" / "adapter_model.safetensors")


def assert_same_training(config: Path, other: Path) -> None:
    one, two = trained(config), trained(other)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    for key in ("loss", "grad_norm"):
        assert losses(config.parent / "out", key) == pytest.approx(losses(other.parent / "out", key), abs=1e-5)
