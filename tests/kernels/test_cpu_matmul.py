"""bfloat16 products on CPUs (``kernels/cpu/matmul.cpp``, ``pooled.cpp``) against the same products in float64."""

import shutil

import pytest
import torch
from support.cpu_layers import COMPILER, adapter_for, filled, make_layer
from support.layers import delta

from qalora_plugin.kernels import cpu

if shutil.which(COMPILER) is None:
    pytest.skip("needs a C++ compiler", allow_module_level=True)
assert cpu.library() is not None  # with a compiler, a kernel that does not build must fail
if not cpu.adds_offsets():
    pytest.skip("needs a CPU with AVX512-BF16", allow_module_level=True)

# Products of bfloat16 numbers are summed in float32, of the largest result, and rounded once to bfloat16, of each.
SUMS, ROUNDING = 2e-6, 2**-8
TOKENS = (1, 2, 5, 6, 7, 95, 96, 97, 200)  # around the six rows of the microkernel and its blocks of 96


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def assert_rounded(found, expected):
    """``found`` is float64 ``expected``, summed in float32 and rounded to the dtype of ``found``."""
    rounding = ROUNDING if found.dtype == torch.bfloat16 else 0
    assert found.shape == expected.shape
    assert ((found.double() - expected).abs() <= rounding * expected.abs() + SUMS * expected.abs().max()).all()


def assert_products(layer, tokens, rank=None, scaling=0.5):
    """Both products with every count of tokens; the weight itself is tested in test_cpu.py."""
    adapter = (None, None) if rank is None else adapter_for(layer, rank)
    weight = filled(layer, *adapter, torch.bfloat16, scaling=scaling).double()
    for count in tokens:
        x, dy = draw(count, layer.in_features), draw(count, layer.out_features, seed=1)
        assert_rounded(cpu.matmul(x, layer.quantized, delta(*adapter, scaling)), x.double() @ weight)
        assert_rounded(cpu.matmul_transposed(dy, layer.quantized, delta(*adapter, scaling)), dy.double() @ weight.t())


@pytest.mark.parametrize("fmt", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("offsets", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_are_the_definitions(bits, group_size, offsets, fmt):
    layer = make_layer(384, 176, bits, group_size, fmt, offsets=offsets)
    assert_products(layer, (1, 50))
    assert_products(layer, (50,), rank=16)


@pytest.mark.parametrize("out_features", [16, 48, 64, 80, 1000, 2816])  # panels have 64 columns
@pytest.mark.parametrize("in_features", [16, 80, 272, 1040])  # and 256 rows at a time
def test_shapes_that_fill_no_block(in_features, out_features):
    assert_products(make_layer(in_features, out_features, 4, 16), (7,), rank=3)


@pytest.mark.parametrize(("bits", "in_features", "out_features"), [(8, 20, 4), (8, 44, 36), (4, 24, 8), (2, 48, 16)])
def test_one_word_a_group_and_odd_numbers_of_words(bits, in_features, out_features):
    assert_products(make_layer(in_features, out_features, bits, 32 // bits), (3,), rank=1)


@pytest.mark.parametrize("rank", [1, 16, 70])
def test_any_number_of_tokens_and_any_rank(rank):
    assert_products(make_layer(320, 208, 4, 32, offsets=torch.float16), TOKENS, rank, scaling=2.0)


def test_no_tokens():
    layer = make_layer(64, 32, 4, 32)
    assert cpu.matmul(draw(0, 64), layer.quantized, None).shape == (0, 32)
    assert cpu.matmul_transposed(draw(2, 0, 32), layer.quantized, None).shape == (2, 0, 64)
    cpu.offset_gradient(draw(9, 2), draw(9, 32))  # leaves sums behind, which are nobody's
    assert not cpu.offset_gradient(draw(0, 2), draw(0, 32)).any()


def test_batches_and_strides():
    layer = make_layer(128, 96, 4, 32)
    x, weight = draw(3, 5, 256)[..., ::2], filled(layer, None, None, torch.bfloat16).double()
    assert not x.is_contiguous()
    assert_rounded(cpu.matmul(x, layer.quantized, None), x.double() @ weight)
    assert_rounded(cpu.pool(x, 4), x.double().unflatten(-1, (4, 32)).sum(-1))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("groups", "group_size"), [(3, 2), (5, 8), (12, 16), (12, 32), (3, 96), (1, 250), (4, 128)])
def test_pool(groups, group_size, tokens):
    x = draw(tokens, groups * group_size)
    assert_rounded(cpu.pool(x, groups), x.double().unflatten(-1, (groups, group_size)).sum(-1))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("groups", "out_features"), [(1, 4), (32, 64), (33, 100), (88, 1000)])
def test_offset_gradient(groups, out_features, tokens):
    pooled, dy = draw(tokens, groups), draw(tokens, out_features, seed=1)
    found = cpu.offset_gradient(pooled, dy)
    assert found.dtype == torch.float32
    assert_rounded(found, pooled.double().t() @ dy.double())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("groups", "group_size", "out_features"), [(1, 512, 4), (3, 16, 64), (32, 32, 100), (33, 128, 1000)]
)
def test_add_offsets(groups, group_size, out_features, tokens):
    """The pooled input and the offsets are bfloat16, too."""
    x, y = draw(tokens, groups * group_size), draw(tokens, out_features, seed=1)
    offsets = draw(groups, out_features, seed=2)
    expected = y.double() + cpu.pool(x, groups).double() @ offsets.double()
    cpu.add_offsets(y, x, cpu.offset_panels(offsets), group_size)
    assert_rounded(y, expected)


def test_threads_do_not_change_a_bit():
    """More threads than panels share their rows."""
    layer = make_layer(1024, 192, 4, 64, offsets=torch.float16)
    adapter, x, dy = adapter_for(layer, 16), draw(900, 1024), draw(900, 192)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 7):
            torch.set_num_threads(number)
            products = (
                cpu.matmul(x, layer.quantized, delta(*adapter, 0.5)),
                cpu.matmul_transposed(dy, layer.quantized, delta(*adapter, 0.5)),
            )
            results.append((*products, cpu.pool(x, 16), cpu.offset_gradient(draw(900, 16), dy)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_a_diverged_adapter_is_not_hidden():
    layer = make_layer(128, 32, 4, 32)
    lora_a, lora_b = adapter_for(layer, 2)
    lora_a[:, 1] = float("nan")
    assert cpu.matmul(draw(3, 128), layer.quantized, delta(lora_a, lora_b)).isnan().all()
    dx = cpu.matmul_transposed(draw(3, 32), layer.quantized, delta(lora_a, lora_b)).view(3, 4, 32)
    assert dx[:, 1].isnan().all()
    assert dx[:, [0, 2, 3]].isfinite().all()


def test_only_large_bfloat16_layers():
    layer = make_layer(512, 512, 4, 32)
    assert (cpu.why_not_multiply(layer.quantized, torch.bfloat16) is None) == (
        cpu.library().qalora_bfloat16() == 1
    )  # else there is AMX
    assert cpu.why_not_multiply(layer.quantized, torch.float32)
    assert cpu.why_not_multiply(layer.quantized, torch.float16)
    assert cpu.why_not_multiply(make_layer(512, 480, 4, 32).quantized, torch.bfloat16)
    assert cpu.why_not_multiply(make_layer(512, 512, 4, 32, act_order=True).quantized, torch.bfloat16)
