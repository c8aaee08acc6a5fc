"""Bit layouts against a bit-by-bit definition and against AutoGPTQ's own packer."""

import importlib.util
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layers import read_stored

from qalora_plugin.core.packing import code_plane, pack_cols, pack_rows, unpack_cols, unpack_rows
from qalora_plugin.core.words import SUPPORTED_BITS, codes_per_period
from qalora_plugin.formats.gptq_zeros import read_zeros, symmetric_words, write_zeros

sizes = st.tuples(st.sampled_from(SUPPORTED_BITS), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**31))


def random_codes(bits, rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, cols), generator=generator)


def bit(words, position):
    """Bit ``position`` of a column of int32 words, read as one little-endian stream."""
    return (int(words[position // 32]) & 0xFFFFFFFF) >> (position % 32) & 1


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_pack_is_a_little_endian_bit_stream(size):
    bits, periods, cols, seed = size
    codes = random_codes(bits, 32 * periods, cols, seed)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (periods * bits, cols)
    for k in (0, 9, 10, 11, 21, 31, 32 * periods - 1):
        expected = sum(bit(words[:, 0], k * bits + i) << i for i in range(bits))
        assert codes[k, 0] == expected


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_unpack_inverts_pack(size):
    bits, periods, cols, seed = size
    codes = random_codes(bits, 32 * periods, cols, seed)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits).long(), codes)
    assert torch.equal(unpack_cols(pack_cols(codes.t(), bits), bits).long(), codes.t())


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_planes_are_strided_rows(size):
    bits, periods, cols, seed = size
    codes = random_codes(bits, 32 * periods, cols, seed)
    words, period = pack_rows(codes, bits), codes_per_period(bits)
    for j in range(period):
        assert torch.equal(code_plane(words, bits, j).long(), codes[j::period])


@given(sizes, st.sampled_from(["gptq", "gptq_v2"]))
@settings(max_examples=60, deadline=None)
def test_zeros_round_trip(size, checkpoint_format):
    bits, periods, groups, seed = size
    zeros = random_codes(bits, groups, 32 * periods, seed)
    stored = write_zeros(zeros, bits, checkpoint_format)
    assert torch.equal(read_zeros(stored, bits, checkpoint_format).long(), zeros)


def test_v1_zero_of_zero_borrows_from_the_next_field():
    """v1 subtracts one per field *word-wise*: a zero of 0 borrows, and adding back per field would be wrong."""
    zeros = torch.tensor([[0, 5, 0, 0, 15, 1, 2, 3]])
    stored = write_zeros(zeros, 4, "gptq")
    word = sum(int(z) << 4 * i for i, z in enumerate(zeros[0]))
    assert int(stored[0, 0]) & 0xFFFFFFFF == (word - 0x11111111) % 2**32
    assert read_zeros(stored, 4, "gptq").tolist() == zeros.tolist()
    per_field = (unpack_cols(stored, 4) + 1) & 15
    assert per_field.tolist() != zeros.tolist()


def test_packing_a_broken_size_is_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_rows(torch.zeros(12, 4), 4)


@pytest.fixture(scope="module")
def auto_gptq_linear():
    """AutoGPTQ's ``qlinear_cuda_old.QuantLinear``, by path from its wheel: the package itself no longer imports."""
    wheels = sorted((Path(__file__).parents[2] / ".cache").glob("auto_gptq-*.whl"))
    assert wheels, "no AutoGPTQ wheel in .cache: run `make .cache/auto_gptq`"
    target = wheels[0].parent / "auto_gptq_src"
    with zipfile.ZipFile(wheels[0]) as archive:
        path = archive.extract("auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py", target)
    spec = importlib.util.spec_from_file_location("qlinear_cuda_old", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.QuantLinear


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_reads_what_auto_gptq_packs(auto_gptq_linear, bits):
    """Codes, zeros and scales of AutoGPTQ's packer come back; zeros ≥ 1, because it smears a zero of 0."""
    from qalora_plugin.core.reference import dequantize

    torch.manual_seed(bits)
    in_features, out_features, group_size = 128, 64, 32
    groups, top = in_features // group_size, 2**bits - 1
    scales = torch.rand(out_features, groups) * 0.1 + 0.05
    zeros = torch.randint(1, top + 1, (out_features, groups)).float()
    codes = torch.randint(0, top + 1, (out_features, in_features)).float()
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    group = torch.arange(in_features) // group_size
    linear.weight.data = scales[:, group] * (codes - zeros[:, group])
    packed = auto_gptq_linear(bits, group_size, in_features, out_features, bias=False, weight_dtype=torch.float32)
    packed.pack(linear, scales, zeros, None)

    assert torch.equal(unpack_rows(packed.qweight, bits).t().float(), codes)
    assert torch.equal(read_zeros(packed.qzeros, bits, "gptq").t().float(), zeros)
    stored = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    weight = dequantize(read_stored(stored, bits))
    torch.testing.assert_close(weight.t().float(), linear.weight.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_symmetric_words_are_packed_symmetric_zeros(bits, checkpoint_format):
    zeros = torch.full((3, 64), 1 << (bits - 1))
    packed = write_zeros(zeros, bits, checkpoint_format)
    period = torch.from_numpy(symmetric_words(bits, checkpoint_format).copy())
    assert torch.equal(packed, period.repeat(3, packed.shape[1] // len(period)))
