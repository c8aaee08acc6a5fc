"""What is checked of a raw Axolotl config before any long work."""

import pytest
import torch
from fabricate import make_base
from serve.checkpoints import quantise_head

from qalora_plugin import preflight
from qalora_plugin.errors import QALoraError
from qalora_plugin.preflight import check_axolotl


@pytest.mark.parametrize("loss", ["liger_fused_linear_cross_entropy", "cut_cross_entropy"])
def test_fused_losses_need_a_dense_head(tmp_path, base, loss):
    config = {"base_model": str(base), "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, loss: True}
    check_axolotl(config)
    with_head = make_base(tmp_path / "base")
    quantise_head(with_head)
    check_axolotl(config | {"base_model": str(with_head), loss: False})
    with pytest.raises(QALoraError, match=rf"{loss} multiplies by lm_head's dense weight itself.*Remove {loss}"):
        check_axolotl(config | {"base_model": str(with_head)})


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_that_a_cpu_only_emulates(base, monkeypatch, caplog, emulated):
    monkeypatch.setattr(preflight, "emulates", lambda dtype: emulated)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    check_axolotl({"base_model": str(base), "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, "bf16": True})
    assert ("Set bf16: false" in caplog.text) == emulated
