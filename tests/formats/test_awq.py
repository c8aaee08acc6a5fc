"""AWQ's gemm layout, against AutoAWQ's own file; and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.other_formats import autoawq_packing, awq_linear, awq_words, make_awq

from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.tensors import TensorInfo
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.packing import unpack_rows
from qalora_plugin.core.reference import dequantize
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.awq import Awq, unpack_columns
from qalora_plugin.formats.base import Unsupported


@pytest.fixture(scope="module")
def packing():
    return autoawq_packing()


def infos(tensors, name="layer"):
    dtypes = {torch.int32: "I32", torch.float16: "F16", torch.int64: "I64", torch.bfloat16: "BF16"}
    return {
        f"{name}.{part}": TensorInfo("model.safetensors", dtypes[tensor.dtype], tuple(tensor.shape))
        for part, tensor in tensors.items()
    }


def read(stored, **quantization):
    awq = Awq({"quant_method": "awq", **quantization})
    spec = awq.specs(infos(stored), "somewhere")["layer"]
    return awq.read(spec, lambda name: stored[name.removeprefix("layer.")])


@pytest.mark.parametrize(("k", "n", "group_size"), [(64, 8, 8), (128, 48, 32), (256, 4104, 128), (96, 40, 96)])
def test_weights_are_autoawqs(packing, k, n, group_size):
    stored = awq_linear(k, n, group_size, torch.Generator().manual_seed(k))
    found = read(stored, group_size=group_size)
    expected = packing.dequantize_gemm(stored["qweight"], stored["qzeros"], stored["scales"], 4, group_size)
    assert (dequantize(found).half() - expected).abs().max() == 0
    words, _ = packing.unpack_reorder_pack(stored["qweight"], stored["qzeros"], 4)
    assert torch.equal(found.qweight, words)


def test_columns_are_interleaved():
    codes = torch.arange(16).repeat(2, 1)
    assert torch.equal(unpack_columns(awq_words(codes)).long(), codes)
    assert int(awq_words(codes)[0, 0]) & 0xFFFFFFFF == 0x75316420


def test_activations_that_are_scaled():
    """AutoAWQ's, where no norm comes before a linear: ``mlp.act.scales`` of StarCoder 2, Falcon, MPT …"""
    stored = infos(awq_linear(64, 16, 32, torch.Generator().manual_seed(0)))
    with pytest.raises(Unsupported, match=r"mlp\.act\.scales divides an activation"):
        Awq({}).specs(stored | {"mlp.act.scales": TensorInfo("model.safetensors", "F16", (64,))}, "somewhere")


def test_symmetric_by_its_zeros():
    spec = GroupwiseSpec("layer", 64, 16, 4, 32)
    generator = torch.Generator().manual_seed(0)
    for zeros, expected in ((torch.full((2, 16), 8), True), (torch.tensor([8, 7]).repeat(2, 8), False)):
        stored = awq_linear(64, 16, 32, generator, zeros)
        assert Awq({}).is_symmetric(spec, lambda name, stored=stored: stored["qzeros"].numpy()) == expected


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"version": "gemv"}, "AWQ of version 'gemv', expected 'gemm'. Use the checkpoint's gemm version"),
        ({"version": "gemv_fast"}, "'gemv_fast'"),
        ({"version": "marlin"}, "'marlin'"),
        ({"version": "exllama"}, "'exllama'"),
        ({"format": "gemv"}, "'gemv'"),
        ({"version": "gemm", "backend": "llm-awq"}, "'llm-awq'"),
        ({"bits": 8}, "bits 8: the gemm layout is of 4 bits"),
        ({"w_bit": 3}, "bits 3"),
        ({"version": ["gemm"]}, "version"),
    ],
    ids=str,
)
def test_other_layouts_are_refused(quantization, message):
    with pytest.raises(Unsupported, match=message) as error:
        Awq({"quant_method": "awq", **quantization}, "somewhere")
    assert "qalora quantize" in error.value.alternatives


def test_detects_auto_rounds_too():
    assert Awq.detect({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"})
    assert not Awq.detect({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"})
    assert not Awq.detect({"quant_method": "gptq"})
    assert Awq({"version": "GEMM", "w_bit": 4, "q_group_size": 32}).reading == "gemm"


def changed(part, change):
    def apply(stored):
        stored[part] = change(stored[part])

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stored: stored.pop("qzeros"), "the tensor qzeros is missing"),
        (lambda stored: stored.pop("scales"), "the tensor scales is missing"),
        (changed("qweight", lambda t: t.long()), "qweight is I64, expected I32"),
        (changed("qweight", lambda t: t[:, :-1]), "do not fit scales"),
        (changed("qzeros", lambda t: t[:-1]), "do not fit scales"),
        (changed("qweight", lambda t: t[:-1]), "4 groups do not divide in_features 127"),
        (changed("scales", lambda t: t[0]), r"scales has shape \(16,\), expected two dimensions"),
        (changed("scales", lambda t: t.int()), "scales is I32, expected F16 or BF16 or F32"),
        (lambda stored: stored.update(bias=torch.zeros(8).half()), r"bias is F16 \(8,\), expected 16 floats"),
    ],
)
def test_damaged_shapes(damage, message):
    stored = awq_linear(128, 16, 32, torch.Generator().manual_seed(0))
    damage(stored)
    with pytest.raises(QALoraError, match=message):
        read(stored)


def test_config_of_another_checkpoint():
    stored = awq_linear(128, 16, 32, torch.Generator().manual_seed(0))
    with pytest.raises(QALoraError, match="stored with group size 32, its quantization config says 128"):
        read(stored, group_size=128)
    with pytest.raises(QALoraError, match=r"no \*\.qweight"):
        Awq({}).specs({}, "somewhere")


def test_not_a_number(tmp_path):
    folder = make_awq(tmp_path / "awq")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    files, awq = Checkpoint.open(folder), Awq({})
    spec = awq.specs(files.tensors, folder)["model.layers.1.mlp.up_proj"]
    with pytest.raises(QALoraError, match=r"up_proj\.scales holds NaN or Inf"):
        awq.check_values(spec, files.array, folder)


def test_is_not_written():
    stored = awq_linear(64, 8, 8, torch.Generator().manual_seed(0))
    assert unpack_rows(read(stored).qweight, 4).shape == (64, 8)
    with pytest.raises(Unsupported, match="read, not written"):
        Awq({}).write("layer", read(stored))
