"""``axolotl train`` as two processes: data parallel and FSDP2 train what one process trains, and the merge follows."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.axolotl_runs import BIN, command, losses, write_config
from support.fabricate import make_adapter, make_base
from support.two_processes import report, train_as_two

pytestmark = pytest.mark.e2e

SETTINGS = {
    "micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 4, "save_steps": 2, "val_set_size": None,
    "eval_steps": None, "gradient_checkpointing": False, "optimizer": "adamw_torch", "adam_epsilon": 1e-3,
    "learning_rate": 0.005, "lr_scheduler": "constant", "qalora": {"verify": False},
}  # fmt: skip
LAYERS = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "reshard_after_forward": True,
}
FSDP2 = {
    "full": LAYERS | {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": True},
    "sharded": LAYERS | {
        "state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": False, "offload_params": True,
        "cpu_offload_pin_memory": False, "activation_checkpointing": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """Makes configs that differ by what they are called with; all train the same adapter on the same base and data."""
    root = tmp_path_factory.mktemp("two")
    base = make_base(root / "base", act_order=True, bias=True)
    adapter = make_adapter(base, root / "adapter", r=8, lora_alpha=16)
    # Of one length: Axolotl has each rank average over its own tokens, which one process with all rows does not.
    rows = ({"instruction": f"say {i:03d}", "input": "", "output": f"{i * i:05d} is its square"} for i in range(64))
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def configure(name: str, **changes) -> Path:
        folder = root / name
        folder.mkdir(exist_ok=True)
        common = {
            "lora_model_dir": str(adapter),
            "datasets": [{"path": str(data), "ds_type": "json", "type": "alpaca"}],
            "dataset_prepared_path": str(root / "prepared"),
        }
        return write_config(folder, base, **SETTINGS | common | changes)

    return configure


@pytest.fixture(scope="module")
def data_parallel(configured) -> Path:
    config = configured("ddp")
    train_as_two(config)
    return config


def trained(config: Path) -> dict[str, torch.Tensor]:
    return load_file(config.parent / "out" / "adapter_model.safetensors")


def assert_same_training(config: Path, other: Path) -> None:
    one, two = trained(config), trained(other)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    for key in ("loss", "grad_norm"):
        assert losses(config.parent / "out", key) == pytest.approx(losses(other.parent / "out", key), abs=1e-5)


def test_data_parallel_trains_what_one_process_does(configured, data_parallel):
    one = configured("one", micro_batch_size=2)
    command(BIN / "axolotl", "train", one, "--launcher", "python")
    start = load_file(one.parent.parent / "adapter" / "adapter_model.safetensors")
    assert max((trained(one)[name] - tensor).abs().max() for name, tensor in start.items()) > 1e-2
    assert_same_training(one, data_parallel)
    for rank in (0, 1):
        found = report(data_parallel, rank)
        assert (found["mode"], found["backend"], found["world"]) == ("DISTRIBUTED", "gloo", 2)
        assert found["here"] == found["packed"]
    assert (data_parallel.parent / "out" / "merged" / "offsets.safetensors").is_file()


@pytest.mark.parametrize("kind", FSDP2)
def test_fsdp2_trains_what_data_parallel_does(configured, data_parallel, kind):
    """In two runs, of which the second resumes the first."""
    options = {"fsdp_version": 2, "fsdp_config": FSDP2[kind]}
    train_as_two(configured(kind, max_steps=2, qalora={"merge": False}, **options))
    checkpoint = configured(kind).parent / "out" / "checkpoint-2"
    resumed = configured(
        kind, resume_from_checkpoint=str(checkpoint), qalora={"verify": kind == "full", "verify_tokens": 512}, **options
    )
    output = train_as_two(resumed)
    assert_same_training(resumed, data_parallel)
    for rank in (0, 1):
        found = report(resumed, rank)
        assert (found["mode"], found["backend"], found["world"]) == ("DISTRIBUTED", "gloo", 2)
        assert found["model"].startswith("FSDP")
        assert found["here"] == found["packed"] / 2
    merged = resumed.parent / "out" / "merged"
    assert output.count("merged into") == 1
    assert load_file(merged / "offsets.safetensors").keys()
    if kind == "full":
        assert "qalora verify: PASSED" in output
