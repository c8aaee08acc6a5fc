"""What the merge refuses, before it writes anything."""

import os
import shutil

import pytest
from support.fabricate import make_base
from support.merges import UP_A, edited, refuse

from qalora_plugin.conversion.merging import is_merge_of
from qalora_plugin.core.errors import QALoraError


def test_existing_output(base, adapter, merged):
    before = sorted(path.name for path in merged.iterdir())
    refuse("exists", base, adapter, merged)
    assert sorted(path.name for path in merged.iterdir()) == before


def test_another_base(adapter, tmp_path):
    other = make_base(tmp_path / "other", seed=9)
    refuse("trained on another base", other, adapter, tmp_path / "out")


def test_offset_dtype(base, adapter, tmp_path):
    refuse(
        "offset_dtype is 'bfloat16', expected one of float16, float32",
        base,
        adapter,
        tmp_path / "out",
        offset_dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "LORA", "use_qalora": True}, "PEFT LORA adapter with use_qalora, which pools"),
        ({"peft_type": "LORA", "use_qalora": False}, "is a PEFT LORA adapter; expected a QA-LoRA adapter"),
        ({"r": 5}, r"lora_A of .* is \(4, .*\), expected \(5, .*\)"),
        ({"qalora": {"pooling": "mean", "format_version": 1}}, "pooling 'mean', expected 'sum'"),
        ({"qalora": None}, "does not say how it pools"),
        ({"tensors": lambda t: t.pop(UP_A)}, "lacks A or B of model.layers.0.mlp.up_proj"),
        ({"tensors": lambda t: t[UP_A].fill_(float("nan"))}, "holds NaN or Inf"),
        ({"tensors": lambda t: t.update({UP_A: t[UP_A].repeat(1, 2)})}, "another group size"),
        ({"tensors": lambda t: t.update({"lm_head.weight": t[UP_A].clone()})}, "holds 'lm_head.weight'"),
        ({"tensors": lambda t: t[UP_A].fill_(1e9)}, "Use offset_dtype float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_adapters(base, adapter, tmp_path, change, match):
    change = dict(change)
    folder = edited(adapter, tmp_path / "a", change.pop("tensors", None), **change)
    refuse(match, base, folder, tmp_path / "out")


def test_pickled_or_absent_adapter(base, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refuse("is a pickle and is never read", base, folder, tmp_path / "out")
    refuse("does not exist", base, tmp_path / "nowhere", tmp_path / "out")


def test_a_merge_cut_short_is_refused(base, adapter, merged, tmp_path):
    """What a power failure can leave of copied shards."""
    folder = shutil.copytree(merged, tmp_path / "merged")
    os.truncate(folder / "model-00001-of-00001.safetensors", 1000)
    with pytest.raises(QALoraError, match="truncated or damaged"):
        is_merge_of(folder, base, adapter, "float16")
    (folder / "config.json").write_text("{}")
    assert not is_merge_of(folder, base, adapter, "float16")
