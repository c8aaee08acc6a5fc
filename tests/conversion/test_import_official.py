"""The official repository's adapters and merged checkpoints, made here as its code makes them."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import LINEARS, make_adapter, make_base, to_old_layout
from transformers import AutoModelForCausalLM

from qalora_plugin import load_base
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.conversion.import_official import import_official
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.packing import unpack_rows
from qalora_plugin.eval.verifying import verify
from qalora_plugin.formats.official import MINIMA, READINGS, ZEROS, ZEROS_MINUS_1
from qalora_plugin.formats.opened import QuantizedCheckpoint

IDS = torch.arange(4, 100).view(2, 48)
KINDS = [{}, {"bits": 3}, {"bits": 2, "group_size": 64}, {"bits": 8, "bias": True}, {"store_g_idx": False, "shards": 2}]


def make_official_adapter(base, folder, pooled=32, alpha=16, rank=64):
    """As ``peft_utils.py`` with PEFT 0.4 saves it, but in safetensors: every linear but the head."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in QuantizedCheckpoint.open(base).specs.items():
        shapes = {"A": (rank, spec.in_features // pooled), "B": (spec.out_features, rank)}
        for part, shape in shapes.items():
            key = f"base_model.model.{name}.lora_{part}.weight"
            tensors[key] = torch.empty(shape).normal_(0, 0.1, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "revision": None,
        "base_model_name_or_path": "/data/llama7b-4bit-32g", "target_modules": list(LINEARS), "task_type": "CAUSAL_LM",
        "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True, "layers_pattern": None,
        "layers_to_transform": None, "injected_fused_attention": False, "injected_fused_mlp": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def unpacked(base, reading):
    """A base's state dict with float16 ``qzeros``, as a patched AutoGPTQ holds it."""
    opened, state = QuantizedCheckpoint.open(base), {}
    for name in opened.files.tensors:
        state[name] = opened.files.tensor(name)
    for name in opened.specs:
        zeros, scales = opened.weight(name).zeros.float(), state[f"{name}.scales"].float()
        floats = {ZEROS: zeros, ZEROS_MINUS_1: zeros - 1, MINIMA: -scales * zeros}[reading]
        state[f"{name}.qzeros"] = floats.half()
    return state


def merge_as_they_do(state, adapter, scale=16 / 64, group_size=32, sign=-1):
    """``merge.py``; with what it says of units and sign put right where the floats are minima."""
    lora = load_file(adapter / "adapter_model.safetensors")
    for key in [key[17:-14] for key in lora if "lora_A" in key]:
        lora_a, lora_b = (lora[f"base_model.model.{key}.lora_{part}.weight"] for part in "AB")
        shift = (lora_b @ lora_a).t() * scale / group_size
        state[f"{key}.qzeros"] += sign * (shift / state[f"{key}.scales"] if sign < 0 else shift)


def write_merged(base, folder, state):
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(state, folder / "llama7b-4bit-32g.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    settings = {key: quantization[key] for key in ("bits", "group_size", "desc_act", "sym")}
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    return folder


def weight_by_their_forward(state, name, bits, reading):
    """``[K, N]`` in float64, as ``qlinear_cuda_old.py`` of AutoGPTQ or of the fork dequantizes."""
    codes = unpack_rows(state[f"{name}.qweight"], bits).double()
    scales, floats = (state[f"{name}.{part}"].double() for part in ("scales", "qzeros"))
    scales, floats = (part.repeat_interleave(len(codes) // len(scales), 0) for part in (scales, floats))
    if reading == MINIMA:
        return scales * codes + floats
    return scales * (codes - floats - int(reading == ZEROS_MINUS_1))


@pytest.mark.parametrize("pooled", [32, 64])
@pytest.mark.parametrize("alpha", [16, 24])
def test_an_adapter_adds_what_it_was_trained_to(base, tmp_path, pooled, alpha):
    """``α/R · B·A·mean``: their forward, by hand, on one linear; and the merge is the import's."""
    adapter = make_official_adapter(base, tmp_path / "adapter", pooled, alpha)
    result = import_official(adapter, tmp_path / "ours", base)
    merged = QuantizedCheckpoint.open(merge(base, result.folder, tmp_path / "m", "float32", progress=False).folder)
    lora, name = load_file(adapter / "adapter_model.safetensors"), "model.layers.1.mlp.down_proj"
    lora_a, lora_b = (lora[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    x = torch.randn(5, 128, dtype=torch.float64)
    wanted = torch.nn.AvgPool1d(pooled)(x) @ lora_a.t() @ lora_b.t() * alpha / 64
    before, after = (reference.dequantize(opened.weight(name)) for opened in (QuantizedCheckpoint.open(base), merged))
    assert (x @ (after - before) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert result.pooled == pooled


def test_an_adapter_is_merged_as_merge_py_merges_it(base, tmp_path):
    adapter = make_official_adapter(base, tmp_path / "adapter")
    state = unpacked(base, ZEROS)
    state = {name: tensor.float() if name.endswith(".qzeros") else tensor for name, tensor in state.items()}
    merge_as_they_do(state, adapter)
    ours = import_official(adapter, tmp_path / "ours", base).folder
    merged = QuantizedCheckpoint.open(merge(base, ours, tmp_path / "m", "float32", progress=False).folder)
    for name in merged.specs:
        wanted = weight_by_their_forward(state, name, 4, ZEROS)
        assert (reference.dequantize(merged.weight(name)) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_merged_checkpoint_keeps_every_weight(tmp_path, kind, reading):
    base = make_base(tmp_path / "base", **kind)
    state = unpacked(base, reading)
    merge_as_they_do(state, make_official_adapter(base, tmp_path / "a", kind.get("group_size", 32)),
                     sign=1 if reading == MINIMA else -1)  # fmt: skip
    folder = write_merged(base, tmp_path / "merged", state)
    bits = kind.get("bits", 4)
    # The mean of so few weights, in 8-bit steps, is not near enough to 0.
    result = import_official(folder, tmp_path / "ours", base if bits == 8 else None)
    assert result.reading == reading
    found = QuantizedCheckpoint.open(result.folder)
    assert found.files.tensors.keys() - state.keys() == {f"{name}.offsets" for name in found.specs}
    for name, spec in found.specs.items():
        weight, wanted = found.weight(name), weight_by_their_forward(state, name, bits, reading)
        assert spec.offset_dtype == "float32"
        for part in ("qweight", "scales"):
            assert torch.equal(getattr(weight, part), state[f"{name}.{part}"])
        error = (reference.dequantize(weight) - wanted).abs()
        assert (error <= 6e-8 * weight.offsets.abs().double()[reference.column_groups(weight)]).all()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found.files.tensor(name), state[name])


def test_with_the_base_the_zeros_are_the_bases(base, tmp_path):
    """So that the offsets are what the adapter added, and no more."""
    state = unpacked(base, ZEROS)
    merge_as_they_do(state, make_official_adapter(base, tmp_path / "a"))
    folder = write_merged(base, tmp_path / "merged", state)
    found = QuantizedCheckpoint.open(import_official(folder, tmp_path / "ours", base).folder)
    wanted = QuantizedCheckpoint.open(base)
    for name in wanted.specs:
        assert torch.equal(found.weight(name).zeros, wanted.weight(name).zeros)
        error = reference.dequantize(found.weight(name)) - weight_by_their_forward(state, name, 4, ZEROS)
        assert error.abs().max() <= 1e-7


def test_loads_trains_and_merges_again(base, tmp_path):
    state = unpacked(base, ZEROS)
    merge_as_they_do(state, make_official_adapter(base, tmp_path / "a"))
    folder = import_official(write_merged(base, tmp_path / "merged", state), tmp_path / "ours").folder
    with torch.no_grad():
        trainable = load_base(folder, dtype=torch.float32).eval()(IDS).logits
        served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits
    assert torch.equal(trainable, served)
    adapter = make_adapter(folder, tmp_path / "second")
    again = merge(folder, adapter, tmp_path / "again", progress=False).folder
    assert Checkpoint.open(again).quantization["offset_dtype"] == "float32"
    assert verify(folder, adapter, again, [IDS[0].tolist()], device="cpu", progress=False).passed
    assert (folder / "tokenizer.json").is_file()


def test_what_the_floats_mean_is_never_guessed(base, tmp_path):
    state = unpacked(base, ZEROS)
    for name in state:
        if name.endswith(".qzeros"):
            state[name] -= 0.5
    folder = write_merged(base, tmp_path / "merged", state)
    with pytest.raises(QALoraError, match=r"cannot be told: .* off by 0\.\d+ steps if they are zeros, .*--base BASE"):
        import_official(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _set(part, make):
    return lambda state, name: state.__setitem__(f"{name}.{part}", make(state[f"{name}.{part}"]))


REFUSED = {
    "packed": (_set("qzeros", lambda t: t[:, :16].int().contiguous()), r"is I32 \(2, 16\), expected floats.*no import"),
    "inf": (_set("qzeros", lambda t: t * float("inf")), "holds NaN or Inf, as packed words do that were cast"),
    "other shape": (_set("qzeros", lambda t: t[:1].clone()), r"is F16 \(1, 128\), expected floats"),
    "act-order": (_set("g_idx", lambda t: t.flip(0)), "in act-order, but the official repository pools neighbouring"),
    "scales gone": (lambda state, name: state.pop(name + ".scales"), r"the shape of scales \(None\)"),
    "codes cut": (_set("qweight", lambda t: t[:-1].clone()), "damaged or not in GPTQ layout"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_is_no_merged_checkpoint(base, tmp_path, case):
    change, match = REFUSED[case]
    state = unpacked(base, ZEROS)
    change(state, "model.layers.0.mlp.up_proj")
    with pytest.raises(QALoraError, match=match):
        import_official(write_merged(base, tmp_path / "merged", state), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_a_config_without_bits(base, tmp_path):
    folder = write_merged(base, tmp_path / "merged", unpacked(base, ZEROS))
    (folder / "quantize_config.json").unlink()
    with pytest.raises(QALoraError, match=r"bits in its quantisation config is None.*quantize_config\.json there"):
        import_official(folder, tmp_path / "out")


def test_refuses_another_base(base, tmp_path):
    folder = write_merged(base, tmp_path / "merged", unpacked(base, ZEROS))
    other = make_base(tmp_path / "other", seed=1)
    with pytest.raises(QALoraError, match=r"is no merge onto .*qweight differs, which merge\.py never touches"):
        import_official(folder, tmp_path / "out", other)


def test_an_ordinary_base_needs_no_import(base, tmp_path):
    with pytest.raises(QALoraError, match="An ordinary GPTQ checkpoint needs no import"):
        import_official(to_old_layout(make_base(tmp_path / "old")), tmp_path / "out")


def test_pickles_are_refused_with_the_command_that_converts_them(base, tmp_path):
    folder = write_merged(base, tmp_path / "merged", unpacked(base, ZEROS))
    (weights,) = folder.glob("*.safetensors")
    torch.save(load_file(weights), folder / "merged.bin")
    weights.unlink()
    with pytest.raises(QALoraError, match=r"as a pickle \(merged\.bin\).*Convert it: python -c") as error:
        import_official(folder, tmp_path / "out")
    torch.save({}, folder / "optimizer.pt")  # of two the first was offered, whichever that was
    with pytest.raises(
        QALoraError, match=r"several pickles \(merged\.bin, optimizer\.pt\).*into one model\.safetensors"
    ):
        import_official(folder, tmp_path / "out")
    (folder / "optimizer.pt").unlink()
    command = str(error.value).partition("Convert it: ")[2]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert import_official(folder, tmp_path / "out").modules == 14


def test_adapters_of_peft_are_told_apart(base, tmp_path):
    adapter = make_official_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_qalora": True}))
    with pytest.raises(QALoraError, match=r"PEFT's own pooling\. Use qalora import peft"):
        import_official(adapter, tmp_path / "out", base)


def test_opening_such_a_merge_says_how_to_import_it(base, tmp_path):
    folder = write_merged(base, tmp_path / "merged", unpacked(base, ZEROS))
    with pytest.raises(QALoraError, match=r"qzeros is F16, expected int32 words, .*qalora import official SRC OUT"):
        QuantizedCheckpoint.open(folder)
