"""``y += P(x)·offsets`` as vLLM's layers call it, against ``quant/reference.py`` in float64."""

from functools import partial

import pytest
import torch

from qalora_plugin.core import reference
from qalora_plugin.kernels import cpu
from vllm_ext import ops
from vllm_ext.ops import add_factored, add_offsets, prepare, prepare_factors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K = 256
# Relative to the result's norm: a float32 sum, then one rounding to the dtype of y. The compiled kernel of a CPU rounds
# pooled inputs and offsets to bfloat16 as well.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=[False, True], ids=["torch", "compiled"])
def compiled(request, monkeypatch):
    """Whether a CPU's bfloat16 layers take the compiled kernel, whatever their size."""
    if request.param and (DEVICE == "cuda" or not cpu.adds_offsets()):
        pytest.skip("needs a CPU with AVX512-BF16 (and a C++ compiler)")
    monkeypatch.setattr(ops, "_SMALLEST", 0 if request.param else 1 << 40)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("offset_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("lead", [(7,), (2, 3), (3000,)], ids=str)
def test_adds_pooled_times_offsets(dtype, offset_dtype, group_size, lead):
    torch.manual_seed(0)
    groups = K // group_size
    x, y = torch.randn(*lead, K).to(dtype), torch.randn(*lead, 192).to(dtype)
    offsets = torch.randn(groups, 192).to(offset_dtype)
    g_idx = torch.arange(K) // group_size
    expected = y.double() + reference.pool(x.double(), g_idx, groups) @ offsets.double()
    found = y.to(DEVICE)
    add_offsets(found, x.to(DEVICE), prepare(offsets.to(DEVICE), dtype, group_size), group_size)
    assert found.dtype == dtype
    assert (found.cpu() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("factor_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("lead", [(1,), (2, 3), (300,)], ids=str)
def test_adds_pooled_times_factors(dtype, factor_dtype, lead):
    torch.manual_seed(0)
    x, y = torch.randn(*lead, K).to(dtype), torch.randn(*lead, 192).to(dtype)
    a, b = torch.randn(K // 32, 3), torch.randn(3, 192).to(factor_dtype)
    pooled = reference.pool(x.double(), torch.arange(K) // 32, K // 32)
    expected = y.double() + pooled @ reference.factored_offsets(a, b)
    found, held = y.to(DEVICE), prepare_factors(a.to(DEVICE), b.to(DEVICE), dtype)
    add_factored(found, x.to(DEVICE), *held, 32)
    assert found.dtype == dtype
    assert (found.cpu() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_factors_that_are_no_smaller_are_not_held():
    assert prepare_factors(torch.randn(8, 8), torch.randn(8, 64), torch.float32) is None
    assert prepare_factors(torch.randn(128, 16), torch.randn(16, 4096), torch.bfloat16) is not None


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", [1, 1 << 12])
def test_pooling_does_not_round_before_it_has_summed(rows):
    x = torch.ones(rows, 512, dtype=torch.bfloat16, device=DEVICE)  # 256 + 1 is no bfloat16: a running sum would stay
    y = torch.zeros(rows, 1, dtype=torch.bfloat16, device=DEVICE)
    add_offsets(y, x, prepare(torch.ones(1, 1, device=DEVICE), torch.bfloat16, 512), 512)
    assert (y == 512).all()


def test_float16_sums_do_not_overflow():
    x = torch.full((1, 128), 6e3, dtype=torch.float16, device=DEVICE)
    y = torch.zeros(1, 1, dtype=torch.float16, device=DEVICE)
    add_offsets(y, x, prepare(torch.full((1, 1), 1e-3, dtype=torch.float16, device=DEVICE), torch.float16, 128), 128)
    assert y.item() == pytest.approx(128 * 6, rel=1e-3)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_is_well_formed_for_torch_compile(dtype):
    y, x = torch.randn(3, 8).to(DEVICE, dtype), torch.randn(3, 64).to(DEVICE, dtype)
    arguments = (y, x, prepare(torch.randn(2, 8, device=DEVICE), dtype, 32), 32)
    torch.library.opcheck(torch.ops.qalora.add_offsets.default, arguments)
    factors = torch.randn(2, 1, device=DEVICE), torch.randn(1, 8, device=DEVICE)
    torch.library.opcheck(torch.ops.qalora.add_factored.default, (y, x, *factors, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_inside_a_cuda_graph(rows, factored):
    x, y = torch.randn(rows, K, device="cuda").bfloat16(), torch.zeros(rows, 192, device="cuda").bfloat16()
    offsets = torch.randn(8, 192, device="cuda").half()
    if factored:
        held = prepare_factors(torch.randn(8, 2, device="cuda"), offsets[:2], torch.bfloat16)
        term = partial(add_factored, y, x, *held, 32)
    else:
        term = partial(add_offsets, y, x, prepare(offsets, torch.bfloat16, 32), 32)
    term()  # compiles
    wanted, graph = y.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        term()
    y.zero_()
    graph.replay()
    assert torch.equal(y, wanted)
