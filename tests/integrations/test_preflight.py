"""What is checked of a raw Axolotl config before any long work."""

import json

import pytest
import torch
from support.fabricate import make_base
from support.merged_checkpoints import quantize_head

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.axolotl import preflight
from qalora_plugin.integrations.axolotl.preflight import check_axolotl

CONFIG = {"lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
LIGER = "axolotl.integrations.liger.LigerPlugin"
CCE = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"


@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ({"plugins": [LIGER], "liger_fused_linear_cross_entropy": True}, "liger_fused_linear_cross_entropy"),
        ({"plugins": [LIGER], "liger_rope": True}, None),
        ({"plugins": [CCE]}, "cut_cross_entropy"),  # on by default
        ({"plugins": [CCE], "cut_cross_entropy": False}, None),
        ({"cut_cross_entropy": True}, None),  # without its plugin it does nothing
        ({"plugins": ["axolotl.integrations.kd.KDPlugin"], "kd_trainer": True}, "kd_trainer"),
        ({"rl": "dpo", "dpo_use_liger_kernel": True}, "dpo_use_liger_kernel"),
        ({"rl": "grpo", "trl": {"use_liger_loss": True}}, "trl.use_liger_loss"),
    ],
    ids=str,
)
def test_fused_losses_need_a_dense_head(tmp_path, base, keys, refused):
    config = CONFIG | keys
    check_axolotl(config | {"base_model": str(base)})
    with_head = make_base(tmp_path / "base")
    quantize_head(with_head)
    config["base_model"] = str(with_head)
    if refused is None:
        check_axolotl(config)
        return
    with pytest.raises(QALoraError, match=rf"{refused} multiplies by lm_head's dense weight itself.*{refused}"):
        check_axolotl(config)


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_that_a_cpu_only_emulates(base, monkeypatch, caplog, emulated):
    monkeypatch.setattr(preflight, "emulates", lambda dtype: emulated)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    check_axolotl(CONFIG | {"base_model": str(base), "bf16": True})
    assert ("Set bf16: false" in caplog.text) == emulated


def test_what_an_adapter_that_is_trained_on_keeps(base, adapter, caplog):
    """Its rank and alpha, whatever the config says: PEFT takes them from its folder."""
    kept = json.loads((adapter / "adapter_config.json").read_text())
    config = CONFIG | {"base_model": str(base), "lora_model_dir": str(adapter)}
    check_axolotl(config | {"lora_r": kept["r"], "lora_alpha": kept["lora_alpha"]})
    assert "keeps its own" not in caplog.text
    check_axolotl(config | {"lora_r": 32, "lora_alpha": kept["lora_alpha"], "lora_rank_pattern": {"q_proj": 2}})
    assert f"lora_r is 32, but lora_model_dir {adapter} keeps its own: {kept['r']}" in caplog.text
    assert "lora_rank_pattern is {'q_proj': 2}" in caplog.text
    more = {
        "lora_dropout": 0.1,
        "peft_use_rslora": True,
        "qalora": {"shared_a": True},
        "lora_exclude_modules": ["q_proj"],
    }
    check_axolotl(config | more)
    for told in ("lora_dropout is 0.1", "peft_use_rslora is True", "qalora.shared_a is True"):
        assert f"{told}, but lora_model_dir {adapter} keeps its own" in caplog.text
    assert f"lora_exclude_modules: not looked at, for lora_model_dir {adapter} keeps its own 14 linears" in caplog.text


@pytest.mark.parametrize("optimizer", ["muon", "dion"])
def test_optimizers_of_matrices_and_stacks_of_experts(mixtral, optimizer):
    config = CONFIG | {"base_model": str(mixtral), "optimizer": optimizer}
    with pytest.raises(QALoraError, match=f"optimizer: {optimizer} takes matrices alone"):
        check_axolotl(config)
    check_axolotl(config | {"lora_exclude_modules": ["gate_proj", "up_proj", "down_proj"]})
    check_axolotl(config | {"optimizer": "adamw_torch"})
