"""``qalora export lora``: an ordinary PEFT LoRA, equal to the adapter, read by stock PEFT."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base
from support.peft_pooled import dense_twin
from typer.testing import CliRunner

from qalora_plugin import load_base
from qalora_plugin.commands.cli import app
from qalora_plugin.conversion.lora import ExportResult, export_lora
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.loading import load_adapter

TOKENS = torch.randint(4, 100, (2, 60), generator=torch.Generator().manual_seed(0))
CASES = {
    "plain": ({}, {}),
    "act-order": ({"act_order": True}, {}),
    "one group, no g_idx": ({"group_size": -1, "store_g_idx": False}, {}),
    "patterns": ({}, {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}, "use_rslora": True}),
    "partly dense": ({"dense": ("down_proj",)}, {}),
}


def logits_by_peft(base, folder):
    """The exported adapter's logits, by stock PEFT over the dequantised base."""
    model = peft.PeftModel.from_pretrained(dense_twin(base), folder)
    assert type(model.peft_config["default"]) is peft.LoraConfig
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("case", list(CASES))
def test_exported_lora_equals_the_adapter(tmp_path, case):
    base_options, lora = CASES[case]
    base = make_base(tmp_path / "base", **base_options)
    adapter = make_adapter(base, tmp_path / "adapter", std=0.05, **lora)
    result = export_lora(adapter, tmp_path / "out")
    model = load_adapter(load_base(base, dtype=torch.float32), adapter).eval()
    with torch.no_grad():
        wanted = model(TOKENS).logits
        with model.disable_adapter():
            plain = model(TOKENS).logits
    difference = (logits_by_peft(base, result.folder) - wanted).abs().max()
    assert (wanted - plain).abs().max() > 0.05  # or the comparison would see no adapter
    assert difference <= 1e-4 * wanted.abs().max()
    assert result.modules == len(json.loads((result.folder / "adapter_config.json").read_text())["target_modules"])


def test_command_line(base, adapter, tmp_path):
    done = CliRunner().invoke(app, ["export", "lora", str(adapter), str(tmp_path / "out"), "--base", str(base)])
    assert "14 linears; serve it with --enable-lora --max-lora-rank 8" in done.output
    exported, trained = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", adapter))
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    assert torch.equal(exported[key.format("A")], trained[key.format("A")].repeat_interleave(32, dim=1))
    assert torch.equal(exported[key.format("B")], 2 * trained[key.format("B")])  # α/R is 8/4
    again = CliRunner().invoke(app, ["export", "lora", str(adapter), str(tmp_path / "out")])
    assert again.exit_code == 1
    assert "exists" in again.stderr


def test_the_flag_is_one_that_vllm_takes(tmp_path):
    for rank, said in (
        (1, "rank 1 …"),
        (12, "rank 16 …"),
        (64, "rank 64 …"),
        (257, "rank 320 …"),
        (1024, "512 at most"),
    ):
        assert said in ExportResult(tmp_path, 1, rank).summary()[0]


def test_another_base_is_refused(adapter, tmp_path):
    other = make_base(tmp_path / "other", seed=1)
    with pytest.raises(QALoraError, match="was trained on another base"):
        export_lora(adapter, tmp_path / "out", other)
    assert not (tmp_path / "out").exists()


def test_adapter_that_names_no_base(base, adapter, tmp_path):
    nameless = tmp_path / "adapter"
    nameless.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    save_file(load_file(adapter / "adapter_model.safetensors"), nameless / "adapter_model.safetensors")
    with pytest.raises(QALoraError, match=r"does not name its base\. Pass it: --base"):
        export_lora(nameless, tmp_path / "out")
    assert export_lora(nameless, tmp_path / "out", base).modules == 14


def test_diverged_adapter_is_refused(base, adapter, tmp_path):
    broken = tmp_path / "adapter"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(QALoraError, match="holds NaN or Inf"):
        export_lora(broken, tmp_path / "out", base)


def test_nothing_of_ours_is_left_in_the_config(base, adapter, tmp_path):
    config = json.loads((export_lora(adapter, tmp_path / "out", base).folder / "adapter_config.json").read_text())
    assert config.keys() <= set(peft.LoraConfig.__dataclass_fields__) | {"peft_version"}


def test_the_base_stays_as_it_is(base, adapter):
    with pytest.raises(QALoraError, match="which is the base's folder, or inside it"):
        export_lora(adapter, base / "lora", base)
    assert not (base / "lora").exists()
