"""A base that has offsets already (a merged model, an import): trained on, merged onto, verified, exported."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base, write_shards
from transformers import AutoModelForCausalLM

from qalora_plugin import add_adapter, load_adapter, load_base
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.commands.inspecting import inspect
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.conversion.merging import is_merge_of, merge
from qalora_plugin.conversion.writer import write_model
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.verifying import verify
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.integrations.axolotl.preflight import check_axolotl, check_base

TOKENS = torch.randint(4, 100, (2, 60), generator=torch.Generator().manual_seed(0))
SEQUENCES = [TOKENS[0].tolist()]
UNTOUCHED = "model.layers.0.self_attn.q_proj"
TOUCHED = "model.layers.1.mlp.down_proj"
SOME = {"target_modules": ["down_proj", "up_proj"]}


def with_offsets(base, out, dtype=torch.float32, shards=1, only=""):
    """``base`` as one of ours with random offsets, laid out as others may: in the same files as everything else."""
    opened, generator = QuantizedCheckpoint.open(base), torch.Generator().manual_seed(3)
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: opened.files.tensor(name) for name in opened.files.tensors}
    for name in (name for name in opened.specs if only in name):
        step = tensors[f"{name}.scales"].float()
        tensors[f"{name}.offsets"] = (step * torch.randn(step.shape, generator=generator) / 4).to(dtype)
    write_shards(out, tensors, shards)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= {"quant_method": "qalora", "format_version": 1}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def offset_base(base, tmp_path_factory):
    return with_offsets(base, tmp_path_factory.mktemp("offsets") / "base")


@pytest.fixture(scope="module")
def part(offset_base, tmp_path_factory):
    """An adapter on two kinds of linears of ``offset_base``, adding as much as that has."""
    return make_adapter(offset_base, tmp_path_factory.mktemp("part") / "adapter", std=0.1, **SOME)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def added(adapter, name):
    """What an adapter adds to one linear, float64 ``[G, N]``."""
    opened = AdapterFolder.open(adapter)
    return reference.adapter_offsets(*map(torch.from_numpy, opened.factors(name)), opened.scaling(name))


@pytest.mark.parametrize("kind", [{}, {"act_order": True}, {"bits": 3, "group_size": -1}, {"bias": True}], ids=str)
def test_merging_twice_adds_both_adapters(tmp_path, kind):
    base = make_base(tmp_path / "base", **kind)
    first = make_adapter(base, tmp_path / "first", seed=1)
    once = merge(base, first, tmp_path / "once", "float32", progress=False).folder
    second = make_adapter(once, tmp_path / "second", seed=2, r=2)
    twice = merge(once, second, tmp_path / "twice", progress=False).folder
    found, before = QuantizedCheckpoint.open(twice), QuantizedCheckpoint.open(base)
    for name, spec in found.specs.items():
        wanted = added(first, name) + added(second, name)
        assert spec.offset_dtype == "float32"
        assert (found.weight(name).offsets - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            stored = f"{name}.{part}"
            assert torch.equal(found.files.tensor(stored), before.files.tensor(stored))
    assert verify(once, second, twice, SEQUENCES, device="cpu", progress=False).passed
    trained = logits(load_adapter(load_base(once, dtype=torch.float32), second))
    served = logits(AutoModelForCausalLM.from_pretrained(twice, dtype=torch.float32))
    assert (trained - served).abs().max() <= 1e-5 * trained.abs().max()


def test_a_few_steps_of_training(offset_base, tmp_path):
    """Trained, saved, merged, loaded: the loss that training ended with."""
    model = add_adapter(load_base(offset_base, dtype=torch.float32), r=4, target_modules="all-linear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(6):
        losses.append(model(TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path / "adapter")
    merged = merge(offset_base, tmp_path / "adapter", tmp_path / "merged", progress=False).folder
    served = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    with torch.no_grad():
        wanted, found = (one.eval()(TOKENS, labels=TOKENS).loss for one in (model, served))
    assert abs(found - wanted) <= 1e-5 * wanted


def test_loads_as_it_is(offset_base, base):
    """Through ``AutoModelForCausalLM`` and ``load_base`` alike, and the offsets count."""
    found = logits(AutoModelForCausalLM.from_pretrained(offset_base, dtype=torch.float32))
    assert torch.equal(found, logits(load_base(offset_base, dtype=torch.float32)))
    assert (found - logits(load_base(base, dtype=torch.float32))).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_offsets_of_other_linears_stay_byte_for_byte(base, part, tmp_path, dtype, shards):
    own = with_offsets(base, tmp_path / "base", dtype, shards)
    adapter = rebound(part, own, tmp_path / "adapter")
    result = merge(own, adapter, tmp_path / "out", progress=False)
    assert not result.linked  # every file held offsets
    before, after = QuantizedCheckpoint.open(own), QuantizedCheckpoint.open(result.folder)
    assert before.files.tensors.keys() == after.files.tensors.keys()
    changed = {f"{name}.offsets" for name in AdapterFolder.open(adapter).modules}
    for name, info in before.files.tensors.items():
        if name not in changed:
            assert info.dtype == after.files.tensors[name].dtype
            assert torch.equal(before.files.tensor(name), after.files.tensor(name))
    wanted = before.weight(TOUCHED).offsets.double() + added(adapter, TOUCHED)
    stored = "float32"  # whatever the base has: rounding its offsets could outweigh the adapter
    found = after.weight(TOUCHED).offsets
    assert str(found.dtype) == f"torch.{stored}"
    assert torch.equal(found, wanted.float().to(found.dtype))
    assert after.files.quantization["offset_dtype"] == stored
    assert verify(own, adapter, result.folder, SEQUENCES, device="cpu", progress=False).passed
    logits(AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32))


def rebound(adapter, base, out):
    """An adapter that says it was trained on ``base``, whose linears are the same."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["qalora"]["base_fingerprint"] = QuantizedCheckpoint.open(base).fingerprint()
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def test_offsets_only_where_the_base_has_some(base, part, tmp_path):
    """An adapter adds its own to linears without, and leaves the rest."""
    own = with_offsets(base, tmp_path / "base", only="self_attn")
    merged = merge(own, rebound(part, own, tmp_path / "a"), tmp_path / "out", progress=False).folder
    found = QuantizedCheckpoint.open(merged)
    having = {name for name, spec in found.specs.items() if spec.offset_dtype}
    assert having == {name for name in found.specs if not name.endswith("gate_proj")}
    assert torch.equal(found.weight(TOUCHED).offsets, added(part, TOUCHED).float())
    assert inspect(merged).with_offsets == len(having)


@pytest.mark.parametrize(("first", "second"), [("float32", "float16"), ("float16", "float32"), ("bfloat16", "float16")])
def test_verify_judges_by_what_the_adapter_changed(base, tmp_path, first, second):
    """Other linears keep their offsets as the base has them."""
    own = with_offsets(base, tmp_path / "base", getattr(torch, first), only="down_proj")
    adapter = make_adapter(own, tmp_path / "adapter", std=0.1, target_modules=["q_proj"])
    merged = merge(own, adapter, tmp_path / "out", second, progress=False).folder
    report = verify(own, adapter, merged, SEQUENCES, device="cpu", progress=False)
    assert report.passed, report.failures
    assert report.offset_dtype == second


@pytest.mark.parametrize("has_offsets", [False, True])
def test_inspect_foretells_what_a_merge_adds(base, tmp_path, has_offsets):
    own = with_offsets(base, tmp_path / "base") if has_offsets else base
    foretold = inspect(own)
    merge(own, make_adapter(own, tmp_path / "adapter", r=16), tmp_path / "out", progress=False)
    offsets = load_file(tmp_path / "out" / "offsets.safetensors")
    assert foretold.merged_extra == sum(part.numel() * part.element_size() for part in offsets.values())
    assert {str(part.dtype) for part in offsets.values()} == {f"torch.{foretold.merged_dtype}"}


@pytest.mark.parametrize("shards", [1, 3])
def test_files_without_offsets_are_linked(base, part, tmp_path, shards):
    """As an import writes them: offsets in files of their own."""
    own = tmp_path / "base"
    mixed = with_offsets(make_base(tmp_path / "plain", shards=shards), tmp_path / "mixed", shards=shards)
    opened = QuantizedCheckpoint.open(mixed)
    own.mkdir()
    tensors = ((name, opened.files.tensor(name)) for name in opened.files.tensors)
    write_model(own, opened.files.config, opened.files.quantization, tensors)
    result = merge(own, rebound(part, own, tmp_path / "a"), tmp_path / "out", progress=False)
    assert result.linked
    shared = [path for path in result.folder.glob("*.safetensors") if path.stat().st_nlink > 1]
    assert shared
    assert not any(name.endswith(".offsets") for path in shared for name in load_file(path))


def test_the_default_dtype_is_that_of_the_bases_offsets(offset_base, part, tmp_path):
    """Rounding them to float16 would outweigh the adapter; asked for, it is done."""
    for asked, stored in ((None, "float32"), ("float16", "float16")):
        out = merge(offset_base, part, tmp_path / stored, asked, progress=False).folder
        found = QuantizedCheckpoint.open(out)
        assert found.specs[TOUCHED].offset_dtype == stored
        assert found.specs[UNTOUCHED].offset_dtype == "float32"  # not the adapter's: as it was
        assert is_merge_of(out, offset_base, part, asked)


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_one_offset_makes_another_base(offset_base, part, tmp_path):
    other = shutil.copytree(offset_base, tmp_path / "other")
    edit(other, lambda t: t[f"{UNTOUCHED}.offsets"][0, 0].mul_(1.001))
    assert QuantizedCheckpoint.open(other).fingerprint() != QuantizedCheckpoint.open(offset_base).fingerprint()
    with pytest.raises(QALoraError, match="was trained on another base"):
        merge(other, part, tmp_path / "out", progress=False)
    with pytest.raises(QALoraError, match="was trained on another base"):
        load_adapter(load_base(other, dtype=torch.float32), part)


def test_an_adapter_of_the_base_is_none_of_its_merge(base, adapter, merged, tmp_path):
    """Nor one that was saved when fingerprints were samples of all tensors but the offsets."""
    with pytest.raises(QALoraError, match="was trained on another base"):
        merge(merged, adapter, tmp_path / "out", progress=False)
    old = shutil.copytree(adapter, tmp_path / "old")
    config = json.loads((old / "adapter_config.json").read_text())
    config["qalora"]["base_fingerprint"] = QuantizedCheckpoint.open(base).fingerprint("sha256:")
    (old / "adapter_config.json").write_text(json.dumps(config))
    assert merge(base, old, tmp_path / "right", progress=False).modules == 14
    with pytest.raises(QALoraError, match="was trained on another base"):
        merge(merged, old, tmp_path / "wrong", progress=False)
    with pytest.raises(QALoraError, match="was trained on another base"):
        load_adapter(load_base(merged, dtype=torch.float32), old)


@pytest.mark.parametrize(
    ("name", "failure"), [(TOUCHED, "not this adapter's"), (UNTOUCHED, "1 base tensors are not the base's")]
)
def test_one_wrong_offset_is_found(offset_base, part, tmp_path, name, failure):
    folder = merge(offset_base, part, tmp_path / "out", progress=False).folder
    assert verify(offset_base, part, folder, SEQUENCES, device="cpu", progress=False).passed
    file = QuantizedCheckpoint.open(folder).files.tensors[f"{name}.offsets"].file
    tensors = load_file(folder / file)
    tensors[f"{name}.offsets"][1, 2] += 1e-4
    save_file(tensors, folder / file, metadata={"format": "pt"})
    report = verify(offset_base, part, folder, SEQUENCES, device="cpu", progress=False)
    assert not report.passed
    assert failure in " ".join(report.failures)


def test_a_lora_over_such_a_base(offset_base, part, tmp_path):
    """The export knows nothing of the base's offsets, and need not."""
    out = export_lora(part, tmp_path / "lora").folder
    lora, adapter = load_file(out / "adapter_model.safetensors"), AdapterFolder.open(part)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(offset_base)
    for name in adapter.modules:
        lora_a, lora_b = (lora[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        wanted = added(part, name).repeat_interleave(32, 0).t()
        assert (lora_b @ lora_a - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_axolotl_takes_it(offset_base, merged):
    for folder in (offset_base, merged):
        opened = check_base(str(folder))
        assert len(opened.specs) == 14
        check_axolotl({"base_model": str(folder), "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True})


def test_offsets_that_are_not_finite_are_refused_early(offset_base, part, tmp_path):
    broken = shutil.copytree(offset_base, tmp_path / "broken")
    edit(broken, lambda t: t[f"{UNTOUCHED}.offsets"][0, 0].fill_(float("nan")))
    with pytest.raises(QALoraError, match=re.escape(f"{UNTOUCHED}.offsets holds NaN or Inf")):
        merge(broken, part, tmp_path / "out", progress=False)
    with pytest.raises(QALoraError, match="holds NaN or Inf"):
        check_base(str(broken))


def test_a_sum_that_float16_cannot_hold(base, part, tmp_path):
    own = with_offsets(base, tmp_path / "base")
    edit(own, lambda t: t[f"{TOUCHED}.offsets"].fill_(70000))
    adapter = rebound(part, own, tmp_path / "a")
    with pytest.raises(QALoraError, match=r"exceed what float16 can hold\. Use offset_dtype float32"):
        merge(own, adapter, tmp_path / "out", "float16", progress=False)
    assert merge(own, adapter, tmp_path / "out", progress=False).modules == 4
