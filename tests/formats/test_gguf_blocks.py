"""Blocks of GGUF ↔ codes, scales, zero-points and offsets: exact, against the gguf package's own dequantization."""

import gguf
import numpy as np
import pytest
import torch
from support.layers import make_layer

from qalora_plugin.core import reference
from qalora_plugin.core.packing import unpack_rows
from qalora_plugin.formats.gguf import blocks as gguf_blocks
from qalora_plugin.formats.gguf.blocks import BLOCK_TYPES, decode
from qalora_plugin.formats.gguf.groupwise import container_bits, to_affine, to_groupwise

ROWS, COLUMNS = 24, 1024
SCALES_AT = {"Q6_K": (208,)}  # of a block; elsewhere at its head, and after it the minima


def random_data(name: str, kind: str = "sane", seed: int = 0) -> np.ndarray:
    """Random bytes, float16 scales between ``sane`` (1e-4 … 1e2, both signs) and ``wild`` (all that float16 has)."""
    generator, block = np.random.default_rng(seed), BLOCK_TYPES[name]
    data = generator.integers(0, 256, (ROWS, COLUMNS // block.block, block.nbytes), dtype=np.uint8)
    for place in SCALES_AT.get(name, (0,) if block.symmetric else (0, 2)):
        if kind == "wild":
            halves = generator.integers(0, 1 << 16, data.shape[:2], dtype=np.uint16).view(np.float16)
            halves = np.where(np.isfinite(halves), halves, 0).astype(np.float16)
        else:
            halves = generator.standard_normal(data.shape[:2]) * 10.0 ** generator.integers(-4, 3, data.shape[:2])
        data[..., place : place + 2] = halves.astype("<f2")[..., None].view(np.uint8)
    return data.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", ["sane", "wild"])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_weights_are_exactly_those_of_the_gguf_package(name, kind):
    data = random_data(name, kind)
    decoded = decode(data, name)
    weight = to_groupwise(decoded, name)
    ours = reference.dequantize(weight).T.numpy()

    group = BLOCK_TYPES[name].group_size
    minima = -decoded.scales * (1 << BLOCK_TYPES[name].bits - 1) if decoded.minima is None else decoded.minima
    exact = decoded.codes * decoded.scales.repeat(group, 1) + minima.repeat(group, 1)
    np.testing.assert_array_equal(ours, exact)  # float64: s·(q − z) + offset = d·q + m
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            ours.astype(np.float32), gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
        )


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_codes_are_kept(name):
    decoded = decode(random_data(name), name)
    weight = to_groupwise(decoded, name)
    bits, kind = container_bits(name), BLOCK_TYPES[name]
    shift = (1 << bits - 1) - (1 << kind.bits - 1) if kind.symmetric else 0
    codes = unpack_rows(weight.qweight, bits).T.numpy()
    np.testing.assert_array_equal(codes, decoded.codes.astype(np.int64) + shift)
    np.testing.assert_array_equal(weight.scales.double().T.numpy(), decoded.scales)
    assert weight.scales.dtype == (torch.float32 if name.endswith("_K") else torch.float16)
    assert (weight.bits, weight.group_size) == (bits, kind.group_size)


@pytest.mark.parametrize("name", [name for name, kind in BLOCK_TYPES.items() if kind.symmetric])
def test_symmetric_types_need_no_offsets(name):
    weight = to_groupwise(decode(random_data(name), name), name)
    assert weight.offsets is None
    assert (weight.zeros == 1 << weight.bits - 1).all()


@pytest.mark.parametrize("name", [name for name, kind in BLOCK_TYPES.items() if not kind.symmetric])
def test_offsets_are_at_most_half_a_step_where_a_zero_point_reaches(name):
    decoded = decode(random_data(name), name)
    weight = to_groupwise(decoded, name)
    scales, offsets = decoded.scales, weight.offsets.double().T.numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = -decoded.minima / scales
    reached = (wanted >= 0) & (wanted <= (1 << weight.bits) - 1)
    assert reached.mean() > 0.05
    assert (np.abs(offsets)[reached] <= np.abs(scales)[reached] / 2).all()


def test_a_group_whose_offset_float32_could_not_hold_keeps_its_minimum():
    codes = np.zeros((1, 32), np.uint8)
    scales, minima = np.array([[2.0**-24 * 63]]), np.array([[-65504.0 * 63]])
    weight = to_groupwise(gguf_blocks.Blocks(codes, scales, minima), "Q4_K")
    assert weight.zeros.item() == 0
    assert weight.offsets.double().item() == minima.item()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_come_back_byte_by_byte(name):
    data = random_data(name)
    decoded = decode(data, name)
    scales = decoded.scales.astype(np.float16)
    if name == "Q4_1":
        affine = to_affine(to_groupwise(decoded, name))
        again = gguf_blocks.encode_q4_1(affine.codes, scales, affine.minima.astype(np.float16))
    elif name == "Q4_0":
        again = gguf_blocks.encode_q4_0(decoded.codes, scales)
    else:
        again = gguf_blocks.encode_q8_0((decoded.codes ^ 0x80).view(np.int8), scales)
    np.testing.assert_array_equal(again, data)


def test_q8_0_survives_float16_in_between():
    weight = np.random.default_rng(0).standard_normal((500, 1024)).astype(np.float32)
    stored = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    half = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0).astype(np.float16)
    again = gguf_blocks.encode_q8_0(*gguf_blocks.quantize_q8_0(half.astype(np.float32)))
    np.testing.assert_array_equal(again, stored)
    plain = gguf.quants.quantize(half.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    assert (plain != stored).any()  # why the scale is looked for


def test_q8_0_is_never_worse_than_the_gguf_packages():
    weight = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    weight[0] = 0
    codes, scales = gguf_blocks.quantize_q8_0(weight)
    ours = np.square(codes * scales.astype(np.float32).repeat(32, 1) - weight).sum()
    kind = gguf.GGMLQuantizationType.Q8_0
    assert ours <= np.square(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind) - weight).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_unpacked_as_the_reference_does(bits):
    layer = make_layer(128, 32, bits, 32).quantized
    affine = to_affine(layer)
    np.testing.assert_array_equal(affine.codes, unpack_rows(layer.qweight, bits).T.numpy())
    dense = affine.codes * affine.scales.repeat(32, 1) + affine.minima.repeat(32, 1)
    np.testing.assert_allclose(dense, reference.dequantize(layer).T.numpy(), rtol=1e-12, atol=1e-12)
