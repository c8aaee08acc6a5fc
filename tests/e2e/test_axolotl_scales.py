"""``qalora: {scales: true}`` through Axolotl: trained, saved, merged, verified."""

import json

import pytest
import torch
from support.axolotl_runs import losses, train_here, write_config

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.formats.opened import QuantizedCheckpoint

pytestmark = pytest.mark.e2e


def test_train_merge_and_verify(base, tmp_path):
    """With an optimizer for which Axolotl makes no parameter groups of its own."""
    options = {"scales": True, "scales_lr_ratio": 4, "verify_tokens": 256}
    train_here(write_config(tmp_path, base, qalora=options, optimizer="adamw_torch_fused", learning_rate=0.003))
    out = tmp_path / "out"
    assert losses(out)[-1] < losses(out)[0]
    adapter = AdapterFolder.open(out)
    assert adapter.config["qalora"]["scales_lr_ratio"] == 4.0
    assert len(adapter.modules) == 14
    for module in adapter.modules:
        d, c = map(torch.from_numpy, adapter.scale_factors(module))
        assert 0 < (d @ c).abs().max() < 1
    merged = QuantizedCheckpoint.open(out / "merged")
    assert all(spec.scales_delta_dtype == "float16" for spec in merged.specs.values())
    assert json.loads((out / "merged" / "config.json").read_text())["quantization_config"]["format_version"] == 2
    assert "| exactness | verified" in (out / "merged" / "README.md").read_text()
