"""The proof must fail when something is wrong."""

import json
import shutil

import pytest
import torch
from fabricate import make_adapter
from safetensors.torch import load_file, save_file

from qalora_plugin import verifying
from qalora_plugin.errors import QALoraError
from qalora_plugin.merging import merge
from qalora_plugin.verifying import verify

SEQUENCES = [list(range(4, 100))]


def check(base, adapter, merged, **options):
    return verify(base, adapter, merged, SEQUENCES, device="cpu", progress=False, **options)


def edit(folder, file, change):
    tensors = load_file(folder / file)
    change(tensors)
    (folder / file).unlink()  # a hard link to the base: never edit in place
    save_file(tensors, folder / file, metadata={"format": "pt"})


def test_report(base, adapter, merged):
    report = check(base, adapter, merged)
    content = json.loads(report.json())
    assert content["passed"]
    assert content["tensors"] == content["tensors_identical"] == 63
    assert content["modules"] == 14
    assert content["tokens"] == 96
    assert 0 < content["weight_error_relative"] < 1e-3
    assert content["merged_new_bytes"] == sum(t.nbytes for t in load_file(merged / "offsets.safetensors").values())


def test_a_flipped_bit_in_the_base_is_found(base, adapter, merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "m")

    def flip(tensors):
        tensors["model.layers.0.mlp.up_proj.qweight"].view(-1)[17] ^= 1

    edit(folder, "model-00001-of-00001.safetensors", flip)
    report = check(base, adapter, folder)
    assert report.tensors_identical == report.tensors - 1
    assert not report.passed


def test_wrong_offsets_are_found(base, adapter, merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "m")
    edit(folder, "offsets.safetensors", lambda t: t["model.layers.0.mlp.up_proj.offsets"].mul_(1.5))
    report = check(base, adapter, folder)
    assert report.tensors_identical == report.tensors
    assert report.weight_error_relative > 0.01
    assert not report.passed


def test_another_adapter_is_found(base, merged, tmp_path):
    assert not check(base, make_adapter(base, tmp_path / "other", seed=4), merged).passed


def test_not_a_merge(base, adapter):
    with pytest.raises(QALoraError, match="quant_method 'gptq': it is no merged"):
        check(base, adapter, base)


def test_bfloat16_reports_without_bars(base, adapter, merged):
    report = check(base, adapter, merged, dtype=torch.bfloat16)
    assert report.dtype == "bfloat16"
    assert report.passed
    assert report.top1_agreement > 0.9


def test_an_adapter_lost_in_float16_is_found(base, tmp_path):
    """So small that no logit shows it: half of it is below float16's smallest number."""
    adapter = make_adapter(base, tmp_path / "a", std=1e-4)
    for dtype, passes in (("float16", False), ("float32", True)):
        folder = merge(base, adapter, tmp_path / dtype, offset_dtype=dtype, progress=False).folder
        assert check(base, adapter, folder).passed is passes


def test_compares_in_float32_after_a_run_with_tf32(base, adapter, merged, monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []
    compare = verifying._compare_logits
    monkeypatch.setattr(
        verifying, "_compare_logits", lambda *args: seen.append(matmul.fp32_precision) or compare(*args)
    )
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        check(base, adapter, merged)
        assert seen == ["ieee"]
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
