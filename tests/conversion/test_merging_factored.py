"""Merges whose offsets stay factored: as accurate as dense ones, smaller, composing, and the same for every reader."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base
from transformers import AutoModelForCausalLM

from qalora_plugin import add_adapter, load_base
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.commands.inspecting import inspect
from qalora_plugin.conversion.added import merged_spec
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.folding import factor, fold
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.eval.verifying import verify
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.served_bits import offset_bits, served_bits

SEQUENCES = [list(range(4, 60)), list(range(60, 4, -1))]
MODULE, UNTOUCHED = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"
SHAPES = [(4096, 4096, 32, 16), (1536, 576, 32, 16), (576, 1536, 32, 16), (2048, 1024, 64, 64), (64, 96, 32, 16)]


def check(base, adapter, merged):
    return verify(base, adapter, merged, SEQUENCES, device="cpu", progress=False)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A base, an adapter, their merge, an adapter on that and its merge; offsets factored, and the first dense, too."""
    folder = tmp_path_factory.mktemp("chain")
    make_base(folder / "base")
    make_adapter(folder / "base", folder / "first", r=2)
    merge(folder / "base", folder / "first", folder / "once", progress=False, offsets="factored")
    merge(folder / "base", folder / "first", folder / "dense", "float32", progress=False, offsets="dense")
    make_adapter(folder / "once", folder / "second", seed=1, r=1, target_modules=["up_proj", "q_proj"])
    merge(folder / "once", folder / "second", folder / "twice", progress=False, offsets="factored")
    return folder


def adapters(k, n, g, rank, std):
    """Of full size, ill-conditioned, and with rows of very different sizes."""
    generator = np.random.default_rng(0)
    a, b = generator.uniform(-1, 1, (rank, k // g)), std * generator.standard_normal((n, rank))
    yield a, b
    yield a + 30 * a[:1], b
    yield a, b * np.logspace(0, -4, rank)


@pytest.mark.parametrize("std", [1e-3, 1e-5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_dense_offsets(shape, std):
    """In the Euclidean norm, against float64: in float16 as offsets in float16 (often by 2 % better), which lose digits
    where they are small; in float32 by 1e-7."""
    for lora_a, lora_b in adapters(*shape, std):
        lora_a, lora_b = lora_a.astype(np.float32), lora_b.astype(np.float32)
        exact = reference.adapter_offsets(torch.from_numpy(lora_a), torch.from_numpy(lora_b), 2.0)
        dense = torch.from_numpy(fold(lora_a, lora_b, 2.0, "float16")).double()
        errors = {}
        for dtype in ("float16", "float32"):
            a, b, lost = factor(lora_a, lora_b, 2.0, dtype)
            assert (a.dtype, b.dtype) == (np.float32, dtype)
            assert a.shape[1] == b.shape[0] == min(lora_a.shape)
            difference = reference.factored_offsets(torch.from_numpy(a), torch.from_numpy(b)) - exact
            errors[dtype] = (difference.norm() / exact.norm()).item()
            assert lost**0.5 == pytest.approx(difference.norm().item(), rel=1e-2 if dtype == "float16" else 1)
        assert errors["float16"] <= 1.005 * ((dense - exact).norm() / exact.norm()).item()
        assert errors["float16"] < 2.2e-4
        assert errors["float32"] < 1e-7


def test_what_is_nothing_and_what_is_huge():
    for scale in (0.0, 1e-30, 1e30):
        a, b, _ = factor(np.full((2, 3), scale, np.float32), np.ones((5, 2), np.float32), 1.0, "float16")
        product = a.astype(np.float64) @ b.astype(np.float64)
        assert np.allclose(product, 2 * scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("spec", "rank", "dtype", "wanted"),
    [
        (GroupwiseSpec("x", 4096, 4096, 4, 32), 16, "float16", 16 * (4 * 128 + 2 * 4096)),
        (GroupwiseSpec("x", 4096, 4096, 4, 32), 16, "float32", 16 * 4 * (128 + 4096)),
        (GroupwiseSpec("x", 4096, 4096, 4, 4096), 16, "float16", 2 * 4096),  # one group: dense
        (GroupwiseSpec("x", 256, 256, 4, 32), 8, "float16", 2 * 8 * 256),  # rank of all groups: dense
        (GroupwiseSpec("x", 4096, 4096, 4, 32, offset_dtype="float16"), 16, "float32", 4 * 128 * 4096),  # onto dense
        (GroupwiseSpec("x", 4096, 4096, 4, 32, offset_dtype="float16", offset_rank=8), 16, "float16",
         24 * (4 * 128 + 2 * 4096)),
    ],
)  # fmt: skip
def test_the_smaller_form(spec, rank, dtype, wanted):
    assert offset_bits(merged_spec(spec, rank, dtype)) == 8 * wanted


def test_7b_serves_at_its_base_s_bits():
    """R 16, g 32: offsets of 0.066 bits a weight instead of 0.5."""
    spec = GroupwiseSpec("x", 4096, 4096, 4, 32)
    dense, factored = (
        served_bits([merged_spec(spec, 16, "float16", form)]).bits["offsets"] / 4096**2 for form in ("dense", "auto")
    )
    assert dense == 0.5
    assert factored == pytest.approx(0.0664, abs=1e-4)


@pytest.mark.parametrize("kind", [{}, {"act_order": True, "shards": 2}, {"group_size": -1, "bias": True}], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_merged_equals_base_plus_adapter(tmp_path, kind, dtype):
    base = make_base(tmp_path / "base", **kind)
    adapter = make_adapter(base, tmp_path / "adapter", rank_pattern={"up_proj": 2})
    result = merge(base, adapter, tmp_path / "out", dtype, progress=False, offsets="factored")
    assert result.factored == result.modules
    report = check(base, adapter, tmp_path / "out")
    assert report.passed, report
    assert report.tensors_identical == report.tensors
    assert report.weight_error_relative < (3e-4 if dtype == "float16" else 1e-7)
    stored = sum(t.nbytes for t in load_file(tmp_path / "out" / "offsets.safetensors").values())
    assert result.new_bytes == report.merged_new_bytes == stored
    found = inspect(tmp_path / "out")
    assert (found.with_offsets, found.with_factored_offsets) == (result.modules, result.modules)
    assert found.served == str(result.served)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_offsets_in_units_of_trained_scales_are_dense(chain, tmp_path, dtype):
    """Onto factors of the base, too."""
    adapter = make_adapter(chain / "once", tmp_path / "adapter", std=0.1, scales=True)
    result = merge(chain / "once", adapter, tmp_path / "out", dtype, progress=False)
    assert result.factored == 0
    report = check(chain / "once", adapter, tmp_path / "out")
    assert report.passed, report
    with pytest.raises(QALoraError, match="no two factors make them up"):
        merge(chain / "once", adapter, tmp_path / "no", progress=False, offsets="factored")
    assert not (tmp_path / "no").exists()


def test_two_merges_add_their_ranks(chain):
    once, twice = (QuantizedCheckpoint.open(chain / name) for name in ("once", "twice"))
    second = AdapterFolder.open(chain / "second")
    assert (once.specs[MODULE].offset_rank, twice.specs[MODULE].offset_rank) == (2, 2)  # of two groups
    assert once.specs[UNTOUCHED].offset_rank == 2 < once.specs[UNTOUCHED].groups
    for part in ("offsets_a", "offsets_b"):
        assert torch.equal(*(one.files.tensor(f"{UNTOUCHED}.{part}") for one in (once, twice)))
    added = reference.adapter_offsets(*map(torch.from_numpy, second.factors(MODULE)), second.scaling(MODULE))
    before, after = (
        reference.factored_offsets(*(one.files.tensor(f"{MODULE}.{part}") for part in ("offsets_a", "offsets_b")))
        for one in (once, twice)
    )
    assert (after - before - added).norm() <= 1e-7 * after.norm()
    report = check(chain / "once", chain / "second", chain / "twice")
    assert report.passed, report


@pytest.mark.parametrize(("first", "then"), [("factored", "dense"), ("dense", "auto")])
def test_from_one_form_to_the_other(chain, tmp_path, first, then):
    """What is factored may become dense; what is dense stays so."""
    base = chain / ("once" if first == "factored" else "dense")
    adapter = make_adapter(base, tmp_path / "adapter", seed=2, r=1, target_modules=["up_proj"])
    merged = merge(base, adapter, tmp_path / "out", progress=False, offsets=then).folder
    found = QuantizedCheckpoint.open(merged)
    assert found.specs[MODULE].offset_rank == 0
    assert bool(found.specs[UNTOUCHED].offset_rank) == (first == "factored")
    assert check(base, adapter, merged).passed
    if first == "dense":
        with pytest.raises(QALoraError, match=r"has offsets in the base that are not factored.* auto or dense"):
            merge(base, adapter, tmp_path / "no", progress=False, offsets="factored")
        assert not (tmp_path / "no").exists()


def test_no_such_form(chain, tmp_path):
    with pytest.raises(QALoraError, match="offsets is 'sparse', expected one of auto, factored, dense"):
        merge(chain / "base", chain / "first", tmp_path / "out", progress=False, offsets="sparse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_computes_and_saves_what_it_loaded(chain, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(chain / "once", dtype=dtype)
    layer, weight = model.get_submodule(MODULE), QuantizedCheckpoint.open(chain / "once").weight(MODULE)
    assert layer.offsets is None
    assert torch.equal(layer.dense_weight(), reference.dequantize(weight, torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.quantized.offsets, weight.offsets)
    model.save_pretrained(tmp_path / "again")
    first, again = (Checkpoint.open(folder) for folder in (chain / "once", tmp_path / "again"))
    for name in first.tensors:
        if "proj" in name:
            assert torch.equal(first.tensor(name), again.tensor(name)), name
            assert first.tensors[name].dtype == again.tensors[name].dtype
    QuantizedCheckpoint.open(tmp_path / "again")


def test_training_on_it_sees_what_training_on_the_dense_merge_does(chain):
    """Same loss and gradients, but for the float16 of the factors."""
    found = []
    for name in ("once", "dense"):
        torch.manual_seed(0)
        model = add_adapter(load_base(chain / name, dtype=torch.float32), r=4, target_modules="all-linear")
        loss = model(torch.tensor(SEQUENCES), labels=torch.tensor(SEQUENCES)).loss
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (wanted, expected) = found
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-3 * expected[name].norm(), name


def test_fingerprints_cover_factors(chain, tmp_path):
    copy = shutil.copytree(chain / "once", tmp_path / "copy")
    before = QuantizedCheckpoint.open(copy).fingerprint()
    edit(copy, lambda t: t[f"{MODULE}.offsets_b"][0, 0].mul_(1.01))
    assert QuantizedCheckpoint.open(copy).fingerprint() != before
    with pytest.raises(QALoraError, match="was trained on another base"):
        merge(copy, chain / "second", tmp_path / "out", progress=False)


def edit(folder, change):
    tensors = load_file(folder / "offsets.safetensors")
    change(tensors)
    (folder / "offsets.safetensors").unlink()  # which may be a link
    save_file(tensors, folder / "offsets.safetensors", metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != "offsets.safetensors"}
    index["weight_map"] = kept | dict.fromkeys(tensors, "offsets.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[f"{MODULE}.offsets_b"][0, 3].mul_(1.05),
        lambda t: t[f"{MODULE}.offsets_a"][1].mul_(1.01),
        lambda t: t[f"{MODULE}.offsets_b"].copy_(t[f"{MODULE.replace('up', 'gate')}.offsets_b"].clone()),
    ],
)
def test_wrong_factors_are_found(chain, tmp_path, change):
    copy = shutil.copytree(chain / "once", tmp_path / "copy")
    edit(copy, change)
    report = check(chain / "base", chain / "first", copy)
    assert any("not this adapter's" in failure for failure in report.failures), report


A, B = f"{MODULE}.offsets_a", f"{MODULE}.offsets_b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), "offsets_a is there, but offsets_b is missing"),
        (lambda t: t.pop(A), "offsets_b is there, but offsets_a is missing"),
        (lambda t: t.update({f"{MODULE}.offsets": torch.zeros(2, 128)}), "offsets as well as their factors"),
        (lambda t: t.update({A: t[A][:1]}), r"offsets_a has shape \(1, 2\).*expected \(2, r\) and \(r, 128\)"),
        (lambda t: t.update({B: t[B][:1]}), r"and offsets_b \(1, 128\), expected"),
        (lambda t: t.update({A: t[A].flatten()}), r"offsets_a has shape \(4,\)"),
        (lambda t: t.update({A: t[A][:, :0], B: t[B][:0]}), r"offsets_a has shape \(2, 0\)"),
        (lambda t: t.update({A: t[A].half()}), "offsets_a is F16 and offsets_b F16, expected float32"),
        (lambda t: t.update({B: t[B].int()}), "offsets_b I32, expected float32 and a float type"),
        (lambda t: t[A].fill_(float("nan")), "offsets_a holds NaN or Inf"),
        (lambda t: t[B].fill_(float("inf")), "offsets_b holds NaN or Inf"),
        (lambda t: t[A].fill_(3e38), "exceeds what float32 can hold"),
    ],
)
def test_hostile_factors(chain, tmp_path, change, message):
    copy = shutil.copytree(chain / "once", tmp_path / "copy")
    edit(copy, change)
    for read in (
        lambda: QuantizedCheckpoint.open(copy).check_values(),
        lambda: load_base(copy),
        lambda: merge(copy, chain / "second", tmp_path / "out", progress=False),
    ):
        with pytest.raises(QALoraError, match=message) as error:
            read()
        assert "\n" not in str(error.value)
    assert re.search(message, inspect(copy).why_not)


@pytest.mark.parametrize(("folder", "version"), [("once", 1), ("once", 2), ("dense", 3), ("dense", 2)])
def test_a_version_of_other_tensors(chain, tmp_path, folder, version):
    copy = shutil.copytree(chain / folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(QALoraError, match=f"format_version is {version}, but it holds .*offsets_a|no .scales_delta"):
        QuantizedCheckpoint.open(copy)


def test_exports_read_the_product(chain, tmp_path):
    """As the dense merge is exported, and nothing of the factors is left in what they write."""
    from qalora_plugin.conversion.export_gptq8 import export_gptq8
    from qalora_plugin.conversion.export_mlx import export_mlx

    biases, lost = [], []
    for name in ("once", "dense"):
        out = tmp_path / name
        lost.append(export_gptq8(chain / name, out / "gptq8", progress=False).lost_of_offsets)
        export_mlx(chain / name, out / "mlx", progress=False)
        for kind in ("gptq8", "mlx"):
            assert not any("offsets" in tensor for tensor in Checkpoint.open(out / kind).tensors)
        biases.append(Checkpoint.open(out / "mlx").tensor(f"{MODULE}.biases").float())
    assert lost[0] == pytest.approx(lost[1], rel=1e-2)
    assert (biases[0] - biases[1]).norm() <= 1e-3 * biases[1].norm()
