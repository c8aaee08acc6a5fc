"""The Triton kernels against ``quant/reference.py`` in float64; without a GPU interpreted (``tests/conftest.py``)."""

from pathlib import Path

import pytest
import torch
from support.nvidia_machine_code import run_uninterpreted

from qalora_plugin.core import reference
from vllm_ext.kernels import offsets_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# Relative to the result's norm: pooled inputs and offsets in the dtype of x, then one rounding of y.
TOLERANCE = {F32: 2e-6, BF16: 6e-3, F16: 8e-4}
SIZES = {  # (N, G, g): below a tile, whole tiles, one past a tile; g no power of two; one group over all of K
    "below": (40, 3, 8),
    "whole": (128, 32, 32),
    "past": (193, 17, 24),
    "g 128": (64, 5, 128),
    "one group": (72, 1, 688),
}


def check(m, size, x_dtype, offset_dtype, contiguous=True):
    n, groups, g = SIZES[size]
    generator = torch.Generator().manual_seed(m)
    rows = torch.randn(m, groups * g + 8, generator=generator).to(x_dtype)
    x = rows[:, : groups * g]
    x = x.contiguous() if contiguous else x
    y = torch.randn(m, n, generator=generator).to(x_dtype)
    offsets = torch.randn(groups, n, generator=generator).to(offset_dtype)
    g_idx = torch.arange(groups * g) // g
    wanted = y.double() + reference.pool(x.double(), g_idx, groups) @ offsets.double()
    found = y.to(DEVICE)
    prepared = offsets_triton.prepare(offsets.to(DEVICE), x_dtype, g)
    offsets_triton.add_offsets(found, x.to(DEVICE), prepared, g)
    assert (found.cpu().double() - wanted).norm() <= TOLERANCE[x_dtype] * wanted.norm()


@pytest.mark.parametrize("dtypes", [(BF16, F16), (F16, F16), (BF16, F32), (F32, F32)], ids=str)
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("m", [1, 3, 16, 31, 33, 130])
def test_adds_pooled_times_offsets(m, size, dtypes):
    check(m, size, *dtypes)


@pytest.mark.parametrize("dtypes", [(BF16, F16), (F16, F16), (BF16, F32)], ids=str)
@pytest.mark.parametrize(("size", "rank"), [("below", 1), ("whole", 16), ("past", 5), ("g 128", 48), ("one group", 2)])
@pytest.mark.parametrize("m", [1, 3, 31])
def test_adds_pooled_times_factors(m, size, rank, dtypes):
    n, groups, g = SIZES[size]
    x_dtype, factor_dtype = dtypes
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, groups * g, generator=generator).to(x_dtype)
    y = torch.randn(m, n, generator=generator).to(x_dtype)
    a, b = torch.randn(groups, rank, generator=generator), torch.randn(rank, n, generator=generator).to(factor_dtype)
    pooled = reference.pool(x.double(), torch.arange(groups * g) // g, groups)
    wanted = y.double() + pooled @ reference.factored_offsets(a, b)
    found = y.to(DEVICE)
    held = offsets_triton.prepare_factors(a.to(DEVICE), b.to(DEVICE), x_dtype)
    offsets_triton.add_factored(found, x.to(DEVICE), *held, g)
    assert (found.cpu().double() - wanted).norm() <= TOLERANCE[x_dtype] * wanted.norm()


@pytest.mark.parametrize("m", [2, 40])
def test_rows_with_gaps_between_them(m):
    check(m, "past", BF16, F16, contiguous=False)


def test_no_rows():
    y = torch.zeros(0, 8, device=DEVICE)
    offsets_triton.add_offsets(y, torch.zeros(0, 32, device=DEVICE), torch.zeros(1, 8, device=DEVICE), 32)


@pytest.mark.parametrize("m", [1, 40])
def test_float16_sums_do_not_overflow(m):
    x = torch.full((m, 128), 6e3, dtype=F16, device=DEVICE)
    y = torch.zeros(m, 1, dtype=F16, device=DEVICE)
    offsets_triton.add_offsets(
        y, x, offsets_triton.prepare(torch.full((1, 1), 1e-3, dtype=F16, device=DEVICE), F16, 128), 128
    )
    assert y[:, 0].tolist() == pytest.approx([128 * 6] * m, rel=2e-3)


def test_compiles_for_nvidia_gpus():
    """What the interpreter accepts, the compiler may not; and its machine code shows spills and narrow loads."""
    run_uninterpreted(Path(__file__).with_name("compile_offsets_kernels.py"))
