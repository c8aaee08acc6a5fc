"""``y += P(x)·offsets`` against ``quant/reference.py`` in float64."""

import pytest
import torch

import vllm_ext
from qalora_plugin.quant import reference
from vllm_ext.ops import add_offsets

# Relative to the result's norm: a float32 sum, then one rounding to the dtype of y.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("offset_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("lead", [(7,), (2, 3)])
def test_adds_pooled_times_offsets(dtype, offset_dtype, group_size, lead):
    torch.manual_seed(0)
    groups = 256 // group_size
    x, y = torch.randn(*lead, 256, dtype=dtype), torch.randn(*lead, 48, dtype=dtype)
    offsets = torch.randn(groups, 48, dtype=offset_dtype)
    g_idx = torch.arange(256) // group_size
    expected = y.double() + reference.pool(x.double(), g_idx, groups) @ offsets.double()
    add_offsets(y, x, offsets)
    assert y.dtype == dtype
    assert (y - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_float16_sums_do_not_overflow():
    x, y = torch.full((1, 128), 6e3, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.float16)
    add_offsets(y, x, torch.full((1, 1), 1e-3, dtype=torch.float16))
    assert y.item() == pytest.approx(128 * 6, rel=1e-3)


def test_op_is_well_formed_for_torch_compile():
    arguments = (torch.randn(3, 8), torch.randn(3, 64), torch.randn(2, 8))
    torch.library.opcheck(torch.ops.vllm.qalora_add_offsets.default, arguments)


def test_register_again_is_harmless():
    vllm_ext.register()
    vllm_ext.register()
