"""pack-quantized checkpoints, against compressed-tensors' own compressor and decompressor; and what is refused."""

import copy

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from support.other_formats import decompressed, packed_linear

from qalora_plugin.checkpoint.tensors import TensorInfo
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.reference import dequantize
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.compressed_tensors import CompressedTensors

DTYPES = {
    torch.int32: "I32", torch.float16: "F16", torch.int64: "I64", torch.bfloat16: "BF16", torch.int8: "I8",
    torch.float32: "F32",
}  # fmt: skip
K, N = 128, 96


def config(*schemes):
    groups = {f"group_{i}": scheme.model_dump(mode="json") for i, scheme in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def infos(stored):
    return {
        f"layer.{part}": TensorInfo("model.safetensors", DTYPES[tensor.dtype], tuple(tensor.shape))
        for part, tensor in stored.items()
    }


def load(stored):
    return lambda name: stored[name.removeprefix("layer.")]


def load_array(stored):
    def array(name):
        tensor = stored[name.removeprefix("layer.")]
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return array


def opened(stored, quantization):
    found = CompressedTensors(quantization, "somewhere")
    spec = found.specs(infos(stored), "somewhere")["layer"]
    found.check_values(spec, load_array(stored), "somewhere")
    return found, spec


def linear(bits=4, group_size=32, symmetric=True, **options):
    return packed_linear(K, N, bits, group_size, symmetric, torch.Generator().manual_seed(bits), **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_the_librarys(bits, group_size, symmetric, dtype):
    stored, scheme = linear(bits, group_size, symmetric, dtype=dtype)
    found, spec = opened(stored, config(scheme))
    assert (spec.bits, spec.group_size, spec.in_features) == (bits, group_size or K, K)
    weight = found.read(spec, load(stored))
    expected = decompressed(stored, scheme)
    assert (dequantize(weight).to(dtype).t() - expected).abs().max() == 0
    assert found.is_symmetric(spec, load_array(stored)) == symmetric
    assert set(found.parts(spec)) == set(stored)


def test_zero_points_of_older_files():
    """int8 ``[N, G]``, not packed; and stored though they are symmetric."""
    stored, scheme = linear(symmetric=False)
    zeros = unpack_from_int32(stored["weight_zero_point"], 4, (N, K // 32), packed_dim=0)
    older = stored | {"weight_zero_point": zeros}
    found, spec = opened(older, config(scheme))
    assert not found.is_symmetric(spec, load_array(older))
    assert (dequantize(found.read(spec, load(older))).half().t() - decompressed(stored, scheme)).abs().max() == 0
    stored, scheme = linear(symmetric=True)
    redundant = stored | {"weight_zero_point": torch.zeros(N, K // 32, dtype=torch.int8)}
    found, spec = opened(redundant, config(scheme))
    assert found.is_symmetric(spec, load_array(redundant))
    assert (dequantize(found.read(spec, load(redundant))).half().t() - decompressed(stored, scheme)).abs().max() == 0


def test_act_order():
    g_idx = torch.randperm(K, generator=torch.Generator().manual_seed(0)) // 32
    stored, scheme = linear(symmetric=False, g_idx=g_idx)
    found, spec = opened(stored, config(scheme))
    assert found.is_act_order(spec, load_array(stored))
    weight = found.read(spec, load(stored))
    assert torch.equal(weight.g_idx, g_idx.int())
    assert (dequantize(weight).half().t() - decompressed(stored, scheme)).abs().max() == 0


@pytest.mark.parametrize("stored_g_idx", [torch.full((K,), -1), torch.arange(K) // 32], ids=["unused", "in order"])
def test_act_order_that_is_none(stored_g_idx):
    stored, scheme = linear(g_idx=stored_g_idx)
    found, spec = opened(stored, config(scheme))
    assert not found.is_act_order(spec, load_array(stored))
    weight = found.read(spec, load(stored))
    assert weight.g_idx is None
    assert (dequantize(weight).half().t() - decompressed(stored, scheme)).abs().max() == 0


def test_several_groups_are_told_by_shapes():
    eight, scheme8 = linear(bits=8, group_size=64)
    four, scheme4 = linear(bits=4, group_size=32, symmetric=False)
    both = config(scheme4, scheme8)
    assert opened(eight, both)[1].bits == 8
    assert opened(four, both)[1].bits == 4
    channel, whole = linear(bits=4, group_size=None)
    with pytest.raises(Unsupported, match="fits several of the config_groups"):
        opened(channel, config(whole, linear(bits=8, group_size=None)[1]))


def with_group(**changes):
    def change(quantization):
        quantization["config_groups"]["group_0"] |= changes

    return change


def with_weights(**changes):
    def change(quantization):
        quantization["config_groups"]["group_0"]["weights"] |= changes

    return change


ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format="float-quantized"), "is stored as 'float-quantized', expected 'pack-quantized'"),
        (lambda q: q.update(format="int-quantized"), "is stored as 'int-quantized'"),
        (lambda q: q.update(format="nvfp4-pack-quantized"), "is stored as 'nvfp4-pack-quantized'"),
        (lambda q: q.update(format="marlin-24"), "is stored as 'marlin-24'"),
        (lambda q: q.update(format="mixed-precision"), "is stored as 'mixed-precision'"),
        (with_group(format="nvfp4-pack-quantized"), "is stored as 'nvfp4-pack-quantized'"),
        (with_group(input_activations=ACTIVATIONS), "group_0 quantizes input activations; weights alone"),
        (with_group(output_activations=ACTIVATIONS), "group_0 quantizes output activations"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "quantizes the KV cache"),
        (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "stores sparse weights"),
        (lambda q: q.update(transform_config={"config_groups": {}}), "rotates activations"),
        (with_weights(type="float"), "has 'float' weights of 4 bits"),
        (with_weights(num_bits=5), "has 'int' weights of 5 bits, expected int of 2, 3, 4 or 8"),
        (with_weights(num_bits=[4]), r"weights of \[4\] bits"),
        (with_weights(strategy="tensor", group_size=None), "has strategy 'tensor' with group_size None"),
        (with_weights(strategy="block"), "has strategy 'block'"),
        (with_weights(group_size=0), "has strategy 'group' with group_size 0"),
        (with_weights(group_size=[32], strategy=None), r"has strategy 'group' with group_size \[32\]"),
    ],
)
def test_what_gptq_has_no_place_for(change, message):
    quantization = copy.deepcopy(config(linear()[1]))
    change(quantization)
    with pytest.raises(Unsupported, match=message) as error:
        CompressedTensors(quantization, "somewhere")
    assert "qalora quantize" in error.value.alternatives


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (None, "config_groups is None, expected groups"),
        ({}, "config_groups is {}"),
        ({"W4A16": ["Linear"]}, "expected its weights"),
        ({"group_0": {"targets": ["Linear"], "weights": None}}, "expected its weights"),
    ],
    ids=str,
)
def test_config_that_names_no_settings(groups, message):
    with pytest.raises(QALoraError, match=message):
        CompressedTensors(config() | {"config_groups": groups}, "somewhere")


def without(part):
    return lambda stored: stored.pop(part)


def changed(part, change):
    return lambda stored: stored.update({part: change(stored[part])})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("weight_scale"), "the tensor weight_scale is missing"),
        (without("weight_shape"), "the tensor weight_shape is missing"),
        (without("weight_zero_point"), "fit none of the config_groups"),
        (changed("weight_packed", lambda t: t.long()), "weight_packed is I64, expected I32"),
        (changed("weight_packed", lambda t: t[None]), "not matrices"),
        (changed("weight_packed", lambda t: t[:, :-1]), "fit none of the config_groups"),
        (changed("weight_packed", lambda t: t[:-1]), "fit none of the config_groups"),
        (changed("weight_scale", lambda t: t[:, :-1]), "fit none of the config_groups"),
        (changed("weight_scale", lambda t: t * float("inf")), "weight_scale holds NaN or Inf"),
        (changed("weight_zero_point", lambda t: t[:-1]), "fit none of the config_groups"),
        (changed("weight_zero_point", lambda t: torch.full((N, K // 32), 8).to(torch.int8)), "exceeds 4 bits"),
        (changed("weight_shape", lambda t: t - 1), "it was padded"),
        (lambda s: s.update(bias=torch.zeros(N - 1).half()), "bias has shape"),
        (lambda s: s.update(weight_g_idx=torch.arange(K + 1)), "weight_g_idx has shape"),
        (lambda s: s.update(weight_g_idx=torch.zeros(K, dtype=torch.int32)), "does not put exactly 32 columns"),
        (lambda s: s.update(weight_g_idx=torch.full((K,), 9, dtype=torch.int32)), "does not put exactly 32 columns"),
    ],
)
def test_damaged_tensors(damage, message):
    stored, scheme = linear(symmetric=False)
    damage(stored)
    with pytest.raises(QALoraError, match=message):
        opened(stored, config(scheme))


def test_weights_of_another_kind_among_them():
    stored, scheme = linear()
    found = CompressedTensors(config(scheme), "somewhere")
    tensors = infos(stored) | {"other.weight_scale": TensorInfo("model.safetensors", "F16", (N, 1))}
    with pytest.raises(Unsupported, match=r"other\.weight_scale is of a weight that is not packed integers"):
        found.specs(tensors, "somewhere")
    with pytest.raises(QALoraError, match=r"no \*\.weight_packed"):
        found.specs({}, "somewhere")


def test_is_not_written():
    stored, scheme = linear()
    found, spec = opened(stored, config(scheme))
    with pytest.raises(Unsupported, match="read, not written"):
        found.write("layer", found.read(spec, load(stored)))
