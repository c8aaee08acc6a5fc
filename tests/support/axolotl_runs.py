"""Axolotl configs over small bases, and two ways to run them: a real command, or in this process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def write_instructions(path: Path, rows: int = 64) -> Path:
    with path.open("w") as file:
        for i in range(rows):
            row = {"instruction": f"say {i}", "input": "", "output": f"number {i} it is, and {i * i} its square"}
            file.write(json.dumps(row) + "\n")
    return path


def write_config(folder: Path, base: Path, **changes) -> Path:
    """A complete config in ``folder``; a change of None removes the key."""
    data = folder / "data.jsonl"
    if not data.exists():
        write_instructions(data)
    config = {
        "base_model": str(base),
        "plugins": ["qalora_plugin.QALoraPlugin"],
        "adapter": "qalora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "datasets": [{"path": str(data), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0.1,
        "sequence_len": 256,
        "output_dir": str(folder / "out"),
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "save_steps": 3,
        "eval_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.001,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": True,
        "special_tokens": {"pad_token": "<pad>"},
        "seed": 1,
        "dataset_num_proc": 1,
    } | changes
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def command(*arguments: str | Path, code: int = 0, timeout: int = 900) -> str:
    """Run a command of this environment; returns stdout and stderr together."""
    done = subprocess.run(
        [str(argument) for argument in arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output[-6000:]
    return output


def train_here(config: Path):
    """What ``axolotl train`` runs, in this process."""
    from axolotl.cli.train import do_cli

    do_cli(str(config))


def losses(output_dir: Path, key: str = "loss") -> list[float]:
    """Logged values of a run, from its last checkpoint's trainer state."""
    last = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]
