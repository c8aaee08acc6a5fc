"""The proof must fail when something is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base

from qalora_plugin import load_adapter, load_base
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval import logits, verifying
from qalora_plugin.eval.verifying import verify
from qalora_plugin.integrations.peft.adapter import QALoraLayer

SEQUENCES = [list(range(4, 100))]


MANY = torch.randint(4, 100, (8, 240), generator=torch.Generator().manual_seed(0)).tolist()


def check(base, adapter, merged, sequences=SEQUENCES, **options):
    return verify(base, adapter, merged, sequences, device="cpu", progress=False, **options)


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


def test_offsets_in_what_no_merge_writes(base, adapter, merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "m")
    edit(folder, "offsets.safetensors", lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    with pytest.raises(QALoraError, match=r"in bfloat16, and a merge writes float32 or float16\."):
        check(base, adapter, folder)


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
    compute = logits._logits
    monkeypatch.setattr(logits, "_logits", lambda *args: seen.append(matmul.fp32_precision) or compute(*args))
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        check(base, adapter, merged)
        assert set(seen) == {"ieee"}
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


# What is right must pass, however far the rounding moves the logits …


@pytest.mark.parametrize("offset_dtype", ["float16", "float32"])
@pytest.mark.parametrize("std", [1e-3, 0.1, 1.0, 5.0])
def test_right_merges_pass_whatever_the_size_of_the_adapter(base, tmp_path, std, offset_dtype):
    adapter = make_adapter(base, tmp_path / "a", std=std)
    report = check(base, adapter, merge(base, adapter, tmp_path / "m", offset_dtype, progress=False).folder)
    assert 0.5 < report.offset_error <= 1.01 or offset_dtype == "float32"
    if std > 1e-3 or offset_dtype == "float32":
        assert report.passed, report.failures


def test_near_ties_pass(base, tmp_path):
    """With so large an adapter the rounding alone turns some top-1 tokens over."""
    adapter = make_adapter(base, tmp_path / "a", std=0.5, seed=2)
    report = check(base, adapter, merge(base, adapter, tmp_path / "m", progress=False).folder, MANY)
    assert report.top1_agreement < 0.995
    assert report.logit_difference > 0.01
    assert report.passed, report.failures


# … and what is wrong must not, however small.


def scaled(factor):
    return lambda tensors: [tensor.mul_(factor) for tensor in tensors.values()]


def one_offset(tensors):
    """The largest of one linear by two units in the last place."""
    tensor = tensors["model.layers.1.mlp.down_proj.offsets"].view(-1)
    tensor.view(torch.int16)[tensor.abs().argmax()] += 2


def swapped_linears(tensors):
    first, second = ("model.layers.0.mlp.up_proj.offsets", "model.layers.0.mlp.gate_proj.offsets")
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()


def swapped_groups(tensors):
    name = "model.layers.0.self_attn.q_proj.offsets"
    tensors[name] = tensors[name].flip(0).contiguous()


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("wrong", [scaled(1.002), scaled(0.5), scaled(-1), one_offset, swapped_linears, swapped_groups])
def test_wrong_merges_fail(base, tmp_path, wrong, std):
    adapter = make_adapter(base, tmp_path / "a", std=std)
    merged = merge(base, adapter, tmp_path / "m", progress=False).folder
    edit(merged, "offsets.safetensors", wrong)
    report = check(base, adapter, merged)
    assert not report.passed
    assert "times their rounding" in report.failures[0]


def test_offsets_of_a_linear_that_the_adapter_leaves_alone(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj"])
    merged = merge(base, adapter, tmp_path / "m", progress=False).folder
    edit(merged, "offsets.safetensors", lambda t: t.update({"model.layers.0.mlp.up_proj.offsets": torch.ones(2, 128)}))
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.mlp.up_proj.offsets"] = "offsets.safetensors"
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(QALoraError, match="up_proj has offsets, but the adapter does not change it"):
        check(base, adapter, merged)


def test_a_merged_config_that_computes_something_else(base, adapter, merged, tmp_path):
    """All tensors are right here: only the logits show it."""
    folder = shutil.copytree(merged, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    report = check(base, adapter, folder)
    assert report.offset_error <= 1.01
    assert "where nothing is rounded" in report.failures[0]


_UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (f"{_UP}.weight", rf"holds {_UP} twice, quantized and dense \({_UP}.weight\)"),
        (f"{_UP}.bias", rf"holds {_UP}.bias, which the base does not, and no merge adds"),
    ],
    ids=["weight", "bias"],
)
def test_a_tensor_that_no_merge_adds(base, adapter, merged, tmp_path, name, match):
    folder = shutil.copytree(merged, tmp_path / "m")
    edit(folder, "model-00001-of-00001.safetensors", lambda tensors: tensors.update({name: torch.zeros(128)}))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(QALoraError, match=match):
        check(base, adapter, folder)


@pytest.mark.parametrize("given", [None, [list(range(4, 120))]], ids=["its own", "given"])
def test_no_sequence_is_longer_than_the_model_takes(tmp_path, given, monkeypatch):
    """Beyond its positions a model that learns an embedding for each fails."""
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 48}
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path / "merged", progress=False).folder
    seen, compute = [], logits._logits
    monkeypatch.setattr(logits, "_logits", lambda model, ids, *rest: seen.extend(ids) or compute(model, ids, *rest))
    report = check(base, adapter, merged, given, max_tokens=100)
    assert report.passed
    assert {len(ids) for ids in seen} == ({48} if given else {48, 4})


def test_tokens_that_the_model_does_not_have(base, adapter, merged):
    with pytest.raises(QALoraError, match="token 128 is none of the 128"):
        check(base, adapter, merged, [[4, 128]])


def test_training_that_scales_otherwise_than_the_merge(base, adapter, merged, monkeypatch):
    """The logits of base + adapter are those of the trained path."""
    delta = QALoraLayer._delta

    def misscaled(self, name):
        found = delta(self, name)
        return found._replace(scaling=1.01 * found.scaling)

    monkeypatch.setattr(QALoraLayer, "_delta", misscaled)
    monkeypatch.setattr(logits, "exact_values", lambda model: {})
    report = check(base, adapter, merged)
    assert not report.passed


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_half_a_unit_in_the_last_place(dtype):
    """What rounds to nearest lies within it, and reaches it."""
    kind = getattr(torch, dtype)
    numbers = torch.randn(100_000, dtype=torch.float64) * 10.0 ** torch.linspace(-9, 4, 100_000, dtype=torch.float64)
    error = (numbers.to(kind).double() - numbers).abs() / verifying.half_ulp(numbers, dtype)
    assert 0.999 < error.max() <= 1.001  # torch rounds to float32 on the way


def test_in_a_process_that_shares_a_model_with_others(base, adapter, tmp_path, monkeypatch):
    """The proof's own models stay whole, and what a base with offsets adds is seen."""
    first = merge(base, adapter, tmp_path / "first").folder
    second = make_adapter(first, tmp_path / "second", std=0.1)
    merged = merge(first, second, tmp_path / "merged").folder
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    seen = []

    def noted(model):
        seen.append(logits_of(model))
        return seen[-1]

    logits_of = logits.exact_values
    monkeypatch.setattr(logits, "exact_values", noted)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert check(first, second, merged).passed
        shared = load_adapter(load_base(first, dtype=torch.float32), second)
        assert any(name.endswith(".words") for name, _ in shared.named_parameters())
        again = logits_of(shared)
    finally:
        torch.distributed.destroy_process_group()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    wanted = logits_of(load_adapter(load_base(first, dtype=torch.float32), second))
    for found in (*seen, again):
        for name, (offsets, _) in wanted.items():
            torch.testing.assert_close(found[name][0], offsets, rtol=0, atol=0)
