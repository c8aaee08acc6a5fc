"""A merged model, or a base, becomes a GGUF file: bit by bit what was there, and in llama.cpp the same model."""

import json
import logging

import gguf
import numpy as np
import pytest
import torch
from support.fabricate import make_adapter, make_base
from support.gguf_files import ARCHITECTURES, gptq_base, in_float32, make_model, make_tokenizer, rewritten, write_gguf
from support.llama_cpp import LlamaCpp, log_probabilities

from qalora_plugin import load_base, merge, verify
from qalora_plugin.conversion.export_gguf import export_gguf
from qalora_plugin.conversion.import_gguf import import_gguf
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.packing import unpack_rows
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf.architectures import of_config, row_order, tensor_names
from qalora_plugin.formats.gguf.blocks import decode
from qalora_plugin.formats.gguf.encoding import type_of
from qalora_plugin.formats.gguf.reading import GgufFile
from qalora_plugin.formats.opened import QuantizedCheckpoint

IDS = list(range(3, 300, 2))
EXACT = 1e-2  # mean |Δ log p|: llama.cpp holds keys and values in float16, and so m
NATIVE = 0.1  # its kernels round activations to 8 bits too


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@torch.no_grad()
def log_p(folder):
    model = load_base(folder, dtype=torch.float32)
    return log_probabilities(model(torch.tensor([IDS])).logits[0].numpy(), IDS)


def llama_cpp_log_p(file):
    with LlamaCpp(file) as model:
        return log_probabilities(model.logits(IDS), IDS)


def merged_of(base, folder, offsets="auto", **lora):
    make_adapter(base, folder / "adapter", **lora)
    merge(base, folder / "adapter", folder / "merged", progress=False, offsets=offsets)
    return folder / "merged"


def assert_holds(file, folder):
    """Codes and scales bit by bit, minima the nearest float16: every linear of Q4_1 in ``file`` against ``folder``."""
    opened, stored = QuantizedCheckpoint.open(folder), GgufFile.open(file)
    architecture = of_config(opened.files.config, folder)
    layers = opened.files.config["num_hidden_layers"]
    names = tensor_names(architecture, layers, [f"{name}.weight" for name in opened.specs])
    for name in opened.specs:
        weight, tensor = opened.weight(name), stored.tensors[names[f"{name}.weight"]]
        assert tensor.type == "Q4_1"
        found = decode(np.array(tensor.data), "Q4_1")
        order = row_order(architecture, opened.files.config, name, len(found.codes))
        order = np.arange(len(found.codes)) if order is None else order
        repeated = weight.group_size // 32
        np.testing.assert_array_equal(found.codes, unpack_rows(weight.qweight, weight.bits).T.numpy()[order])
        scales = weight.scales.double().T.numpy()[order]
        np.testing.assert_array_equal(found.scales, scales.repeat(repeated, 1))
        exact = -scales * weight.zeros.T.numpy()[order]
        if weight.offsets is not None:
            exact = weight.offsets.double().T.numpy()[order] + exact
        np.testing.assert_array_equal(found.minima, exact.astype(np.float16).repeat(repeated, 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_from_gguf_through_an_adapter_back_to_gguf(architecture, tokenizer, tmp_path):
    """The whole way, and llama.cpp computes what transformers does on the merged folder."""
    source = write_gguf(tmp_path / "source.gguf", make_model(architecture), tokenizer, "Q4_1")
    base = import_gguf(source, tmp_path / "base", progress=False).folder
    merged = merged_of(base, tmp_path, std=0.05)
    if architecture == "llama":
        report = verify(base, tmp_path / "adapter", merged)
        assert report.passed, report.failures
    result = export_gguf(merged, tmp_path / "out.gguf", progress=False)
    assert_holds(result.file, merged)
    expected = log_p(merged)
    exact = llama_cpp_log_p(in_float32(result.file, tmp_path / "float32.gguf"))
    assert np.abs(exact - expected).mean() <= EXACT
    assert np.abs(llama_cpp_log_p(result.file) - expected).mean() <= NATIVE
    assert np.abs(log_p(base) - expected).mean() > 5 * EXACT  # so the adapter is there to be seen

    like = export_gguf(merged, tmp_path / "like.gguf", like=source, progress=False)
    assert {name: t.data.tobytes() for name, t in GgufFile.open(like.file).tensors.items()} == {
        name: t.data.tobytes() for name, t in GgufFile.open(result.file).tensors.items()
    }


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_there_and_back_every_byte_is_the_same(kind, tokenizer, tmp_path):
    source = write_gguf(tmp_path / "source.gguf", make_model("llama"), tokenizer, kind, embeddings="Q8_0")
    base = import_gguf(source, tmp_path / "base", progress=False).folder
    result = export_gguf(base, tmp_path / "out.gguf", embeddings="q8_0", like=source, progress=False)
    before, after = GgufFile.open(source), GgufFile.open(result.file)
    assert {name: (t.type, t.shape, t.data.tobytes()) for name, t in before.tensors.items()} == {
        name: (t.type, t.shape, t.data.tobytes()) for name, t in after.tensors.items()
    }
    skipped = ("general.file_type", "general.quantization_version")
    copied, given = ({k: v for k, v in file.fields().items() if k not in skipped} for file in (after, before))
    assert copied == given


def test_a_vocabulary_made_from_the_folder_is_the_files(tokenizer, tmp_path):
    source = write_gguf(tmp_path / "source.gguf", make_model("llama"), tokenizer, "Q4_1")
    base = import_gguf(source, tmp_path / "base", progress=False).folder
    out = export_gguf(base, tmp_path / "out.gguf", progress=False).file
    before, after = GgufFile.open(source).fields(), GgufFile.open(out).fields()
    known = {key: value for key, (value, _) in before.items() if key in after and not key.startswith("general.")}
    assert {key: after[key][0] for key in known} == known


@pytest.mark.parametrize(
    ("bits", "group_size", "offsets"),
    [(2, 32, "dense"), (3, 32, "dense"), (4, 64, "dense"), (4, 128, "dense"), (2, 256, "dense"), (4, 32, "factored")],
)
def test_codes_of_2_3_and_4_bits_are_kept(bits, group_size, offsets, tokenizer, tmp_path):
    merged = merged_of(gptq_base(tmp_path / "base", tokenizer, bits, group_size), tmp_path, offsets)
    result = export_gguf(merged, tmp_path / "out.gguf", progress=False)
    assert result.types == {"F16": 1, "Q4_1": 14, "F32": 5}
    assert_holds(result.file, merged)
    exact = llama_cpp_log_p(in_float32(result.file, tmp_path / "float32.gguf"))
    assert np.abs(exact - log_p(merged)).mean() <= EXACT
    assert result.total.scales == 0
    assert 0 < result.total.mean_step < 5e-3
    assert result.total.largest_step < 2e-2


def test_trained_scales_are_rounded_to_float16_and_it_is_said(tokenizer, tmp_path, caplog):
    merged = merged_of(gptq_base(tmp_path / "base", tokenizer), tmp_path, std=0.1, scales=True)
    with caplog.at_level(logging.WARNING):
        result = export_gguf(merged, tmp_path / "out.gguf", progress=False)
    assert 0 < result.total.scales <= 2**-11
    assert "scales are rounded to float16" in caplog.text
    opened, stored = QuantizedCheckpoint.open(merged), GgufFile.open(result.file).tensors
    for leaf in ("gate", "up", "down"):
        weight = opened.weight(f"model.layers.1.mlp.{leaf}_proj")
        found = decode(np.array(stored[f"blk.1.ffn_{leaf}.weight"].data), "Q4_1")
        np.testing.assert_array_equal(found.codes, unpack_rows(weight.qweight, 4).T.numpy())
        np.testing.assert_array_equal(found.scales, weight.scales.T.numpy().astype(np.float16))
    exact = llama_cpp_log_p(in_float32(result.file, tmp_path / "float32.gguf"))
    assert np.abs(exact - log_p(merged)).mean() <= EXACT
    assert np.abs(log_p(tmp_path / "base") - log_p(merged)).mean() > 5 * EXACT


def test_symmetric_4_bit_without_offsets_is_q4_0_exactly(tokenizer, tmp_path):
    base = gptq_base(tmp_path / "base", tokenizer, sym=True)
    result = export_gguf(base, tmp_path / "out.gguf", progress=False)
    assert result.types["Q4_0"] == 14
    assert result.losses == {}
    assert np.abs(llama_cpp_log_p(in_float32(result.file, tmp_path / "f.gguf")) - log_p(base)).mean() <= EXACT


@pytest.mark.parametrize(("choice", "kind", "lost"), [("f16", "F16", 2**-11), ("q8_0", "Q8_0", 1 / 128)])
def test_8_bit_with_offsets_is_f16_or_q8_0_with_its_loss(choice, kind, lost, tokenizer, tmp_path, caplog):
    merged = merged_of(gptq_base(tmp_path / "base", tokenizer, bits=8, group_size=64), tmp_path)
    with caplog.at_level(logging.WARNING):
        result = export_gguf(merged, tmp_path / "out.gguf", eight_bit=choice, progress=False)
    assert result.types[kind] == 14 + (kind == "F16")
    name = "model.layers.1.mlp.down_proj"
    exact = reference.dequantize(QuantizedCheckpoint.open(merged).weight(name)).T.numpy()
    tensor = GgufFile.open(result.file).tensors["blk.1.ffn_down.weight"]
    found = gguf.quants.dequantize(np.array(tensor.data), gguf.GGMLQuantizationType[tensor.type]).astype(np.float64)
    loss = (np.abs(found - exact).max(1) / np.abs(exact).max(1)).max()
    assert 0 < loss <= lost
    assert result.losses[f"{name}.weight"].dense == pytest.approx(loss, rel=1e-6)
    assert "dense weights are rounded" in caplog.text


def test_scales_of_k_quants_lose_what_is_said(tokenizer, tmp_path, caplog):
    source = write_gguf(tmp_path / "source.gguf", make_model("llama"), tokenizer, {"": "Q4_K", "attn_v": "Q6_K"})
    base = import_gguf(source, tmp_path / "base", progress=False).folder
    with caplog.at_level(logging.WARNING):
        result = export_gguf(base, tmp_path / "out.gguf", progress=False)
    assert result.types == {"F16": 1 + 2, "Q4_1": 12, "F32": 5}
    worst, scale_error, opened = 0.0, 0.0, QuantizedCheckpoint.open(base)
    stored = GgufFile.open(result.file).tensors
    for name in (f"model.layers.{i}.mlp.{leaf}_proj" for i in (0, 1) for leaf in ("gate", "up", "down")):
        weight = opened.weight(name)
        exact = reference.dequantize(weight).T.numpy()
        kind = name.split(".")[2], name.split(".")[-1].removesuffix("_proj")
        found = decode(np.array(stored[f"blk.{kind[0]}.ffn_{kind[1]}.weight"].data), "Q4_1")
        scales = weight.scales.double().T.numpy()
        there = scales > 0
        approximate = found.codes * found.scales.repeat(32, 1) + found.minima.repeat(32, 1)
        error = np.abs(approximate - exact).reshape(*scales.shape, 32).max(-1)
        loss = result.losses[f"{name}.weight"]
        assert (error[there] / scales[there]).max() <= loss.largest_step * (1 + 1e-9)
        assert (np.abs(found.scales - scales)[there] / scales[there]).max() == pytest.approx(loss.scales, rel=1e-9)
        worst, scale_error = max(worst, loss.largest_step), max(scale_error, loss.scales)
    assert 0 < worst <= result.total.largest_step
    assert result.total.mean_step < 1e-2
    assert 0 < scale_error <= result.total.scales
    assert "scales are rounded to float16" in caplog.text
    assert np.abs(llama_cpp_log_p(in_float32(result.file, tmp_path / "f.gguf")) - log_p(base)).mean() <= EXACT


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, 2**-20), (torch.float32, 2**-11)])
def test_other_floats_are_written_as_f16_embeddings(dtype, lost, tokenizer, tmp_path):
    base = gptq_base(tmp_path / "base", tokenizer, dtype=dtype)
    result = export_gguf(base, tmp_path / "out.gguf", progress=False)
    assert result.types["F16"] == 1
    embedding = result.losses.get("model.embed_tokens.weight")
    assert (embedding.dense if embedding else 0) <= lost


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"act_order": True}, r"act-order \(desc_act\).*quantize the base again without act-order"),
        ({"group_size": 16}, "groups of 16 columns, and a block of GGUF has 32.*Serve it with vLLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but llama.cpp's llama has 'silu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'.*--like BASE.gguf",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_any_work(settings, message, tokenizer, tmp_path):
    base = gptq_base(tmp_path / "base", tokenizer, **settings)
    with pytest.raises(Unsupported, match=message) as raised:
        export_gguf(base, tmp_path / "out.gguf", progress=False)
    assert raised.value.reason
    assert raised.value.alternatives
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path):
    with pytest.raises(Unsupported, match=r"has no name in llama.cpp known here. Pass a GGUF .* --like BASE.gguf"):
        export_gguf(make_base(tmp_path / "base"), tmp_path / "out.gguf", progress=False)


def test_other_models_options_and_files_are_refused(tokenizer, tmp_path):
    base = gptq_base(tmp_path / "base", tokenizer)
    source = write_gguf(tmp_path / "like.gguf", make_model("llama", intermediate_size=256), tokenizer, "Q4_1")
    with pytest.raises(
        QALoraError, match=r"like.gguf is another model: .* is \(256, 256\) there, expected \(256, 512\)"
    ):
        export_gguf(base, tmp_path / "out.gguf", like=source, progress=False)
    with pytest.raises(QALoraError, match="embeddings is 'q4_0', expected one of f16, q8_0"):
        export_gguf(base, tmp_path / "out.gguf", embeddings="q4_0", progress=False)
    with pytest.raises(QALoraError, match=r"like.gguf exists"):
        export_gguf(base, source, progress=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    with pytest.raises(
        QALoraError, match="'gpt_neox' model, which cannot be written as GGUF yet, expected one of llama"
    ):
        export_gguf(base, tmp_path / "out.gguf", progress=False)
    assert not (tmp_path / "out.gguf").exists()


def test_like_brings_scaled_positions_along(tokenizer, tmp_path):
    base = gptq_base(tmp_path / "base", tokenizer)
    source = write_gguf(tmp_path / "plain.gguf", make_model("llama"), tokenizer, "Q4_1")
    factors = np.linspace(1, 4, 32, dtype=np.float32)
    like = rewritten(source, tmp_path / "like.gguf", lambda _, t: t.__setitem__("rope_freqs.weight", [factors, 0]))
    out = export_gguf(base, tmp_path / "out.gguf", like=like, progress=False).file
    np.testing.assert_array_equal(GgufFile.open(out).tensors["rope_freqs.weight"].data, factors)
    llama_cpp_log_p(out)


def test_eight_bits_of_a_width_without_whole_blocks():
    """48 columns are no blocks of 32, whatever was asked for: writing them failed in the midst of a file."""
    for columns, kind in ((48, "F16"), (64, "Q8_0")):
        assert type_of(GroupwiseSpec("linear", columns, 96, 8, 16), False, "Q8_0") == kind
