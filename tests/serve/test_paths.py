"""Which path a layer takes, what happens if one is forced, and the weights behind float zero-points."""

import os
import subprocess
import sys

import pytest
import torch
from support.hardware import HAS_KERNEL

from qalora_plugin.core.errors import QALoraError
from vllm_ext import compat
from vllm_ext.kernels.cpu_int4 import Int4PackKernel
from vllm_ext.kernels.select import DENSE, FUSED, SEPARATE, LayerKind, choose_path, forced_path
from vllm_ext.kernels.vllm import FloatZeroKernel, NoKernel, find_float_zero_kernel, float_zeros

pytestmark = pytest.mark.usefixtures("one_rank")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says which paths a CPU has")


def kind(**changes):
    defaults = {
        "prefix": "layers.0.o_proj", "bits": 4, "symmetric": True, "group_size": 128, "act_dtype": BF16,
        "full_shape": (256, 128), "shape": (256, 128), "has_offsets": True, "sortable": True,
    }  # fmt: skip
    return LayerKind(**{**defaults, **changes})


@on_a_cpu
@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({}, FUSED),
        ({"symmetric": False}, FUSED),
        ({"act_dtype": F16}, SEPARATE if HAS_KERNEL else DENSE),
        ({"group_size": 16}, SEPARATE if HAS_KERNEL else DENSE),
        ({"has_offsets": False}, SEPARATE if HAS_KERNEL else FUSED),
        ({"has_offsets": False, "act_dtype": F16}, SEPARATE if HAS_KERNEL else DENSE),
        ({"bits": 3}, DENSE),
        ({"sortable": False}, DENSE),
    ],
)
def test_fastest_possible_path_is_chosen(changes, path):
    assert choose_path(kind(**changes), None)[0] == path


@on_a_cpu
def test_dtype_without_a_kernel_is_refused():
    with pytest.raises(QALoraError, match=r"layers\.0\.o_proj: no kernel takes torch\.float32.*--dtype bfloat16"):
        choose_path(kind(act_dtype=F32), None)
    assert choose_path(kind(act_dtype=F32), DENSE) == (DENSE, None)


@on_a_cpu
def test_forced_fused_zeros_takes_layers_without_offsets_too():
    path, kernel = choose_path(kind(has_offsets=False), FUSED)
    assert (path, isinstance(kernel, Int4PackKernel)) == ((SEPARATE, False) if HAS_KERNEL else (FUSED, True))


@on_a_cpu
@pytest.mark.parametrize(
    ("changes", "forced", "reason"),
    [
        ({"act_dtype": F16}, FUSED, r"takes 4 bits and bfloat16, not 4 bits and torch\.float16"),
        ({"group_size": 16}, FUSED, "groups of .*, not 16"),
        ({"bits": 2}, SEPARATE, "no kernel takes 2-bit codes"),
        ({"act_dtype": F32}, SEPARATE, r"no kernel takes torch\.float32"),
        ({"sortable": False}, FUSED, "differ in their act-order"),
    ],
)
def test_impossible_forced_path(changes, forced, reason):
    with pytest.raises(QALoraError, match=rf"layers\.0\.o_proj cannot be served by the path .*{reason}.*QALORA_PATH"):
        choose_path(kind(**changes), forced)


def test_environment_goes_before_config(monkeypatch):
    monkeypatch.delenv("QALORA_PATH", raising=False)
    assert forced_path({}) is None
    assert forced_path({"serving_path": "dense"}) == "dense"
    monkeypatch.setenv("QALORA_PATH", "kernel+offsets")
    assert forced_path({"serving_path": "dense"}) == "kernel+offsets"
    monkeypatch.setenv("QALORA_PATH", "marlin")
    with pytest.raises(QALoraError, match=r"'marlin', expected one of fused-zeros, kernel\+offsets, dense"):
        forced_path({})


def fabricated(dtype):
    """(codes [K, N], zeros, scales, offsets [G, N]) of a layer with eight groups of 128; a shift averages 0.1 steps."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (1024, 128), generator=generator)
    zeros = torch.randint(0, 16, (8, 128), generator=generator)
    scales = (0.01 * torch.rand(8, 128, generator=generator) + 0.005).to(dtype)
    return codes, zeros, scales, scales.float() * 0.1 * torch.randn(8, 128, generator=generator)


@pytest.mark.parametrize(("dtype", "lost"), [(F16, 0.03), (BF16, 0.25)])  # measured 0.018 and 0.146
def test_float_zeros_hold_the_adapter(dtype, lost):
    """``scales·q + zeros`` is ``scales·(q − zeros) + offsets``, up to one rounding a group."""
    codes, zeros, scales, offsets = fabricated(dtype)
    folded = float_zeros(scales, zeros, offsets)
    group = torch.arange(1024) // 128
    exact = scales.double()[group] * (codes - zeros[group]) + offsets.double()[group]
    found = scales.double()[group] * codes + folded.double()[group]
    assert folded.dtype == dtype
    assert (found - exact).norm() <= lost * offsets.double()[group].norm()


@on_a_cpu
@pytest.mark.parametrize("rows", [1, 128, 129])  # torch's kernel, and the dense GEMM
def test_int4_kernel_of_the_cpu(rows):
    from torch import nn

    from qalora_plugin.core.packing import pack_rows

    kernel = choose_path(kind(full_shape=(1024, 128), shape=(1024, 128)), FUSED)[1]
    codes, zeros, scales, offsets = fabricated(BF16)
    layer = nn.Module()
    layer.qweight, layer.scales = (nn.Parameter(t, requires_grad=False) for t in (pack_rows(codes, 4), scales))
    assert isinstance(kernel, Int4PackKernel)
    kernel.hand_over(layer, zeros.to(torch.uint8), 4, offsets)
    x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    group = torch.arange(1024) // 128
    folded = (offsets - scales.float() * (zeros - 8)).bfloat16()
    wanted = x.double() @ (scales.double()[group] * (codes - 8) + folded.double()[group])
    found = kernel.apply_weights(layer, x)
    assert (found - wanted).norm() <= 4e-3 * wanted.norm()
    torch.library.opcheck(torch.ops.qalora.int4_linear.default, (x, layer.qweight, layer.scales, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("group_size", [64, 128])
def test_machete_with_float_zeros(dtype, group_size):
    from torch import nn
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

    from qalora_plugin.core.packing import pack_rows

    try:
        kernel = find_float_zero_kernel(4, group_size, dtype, (1024, 128), (1024, 128))
    except NoKernel as reason:
        pytest.skip(str(reason))
    codes, _, _, _ = fabricated(dtype)
    generator = torch.Generator().manual_seed(1)
    groups = 1024 // group_size
    scales = (0.01 * torch.rand(groups, 128, generator=generator) + 0.005).to(dtype)
    offsets = scales.float() * torch.randn(groups, 128, generator=generator)
    zeros = torch.full((groups, 128), 8, dtype=torch.uint8)
    layer, shape = nn.Module(), {"input_dim": 0, "output_dim": 1, "weight_loader": print}
    layer.qweight = PackedvLLMParameter(data=pack_rows(codes, 4).cuda(), packed_dim=0, packed_factor=8, **shape)
    layer.scales = GroupQuantScaleParameter(data=scales.cuda(), **shape)
    assert isinstance(kernel, FloatZeroKernel)
    kernel.hand_over(layer, zeros.cuda(), 4, offsets.cuda())
    x = torch.randn(5, 1024, generator=generator).to(dtype)
    group = torch.arange(1024) // group_size
    wanted = x.double() @ (scales.double()[group] * (codes - 8) + offsets.double()[group])
    found = kernel.apply_weights(layer, x.cuda()).cpu().double()
    assert (found - wanted).norm() <= (2e-2 if dtype == BF16 else 3e-3) * wanted.norm()


@pytest.mark.parametrize(
    ("version", "served"),
    [
        ("0.25.1", False),
        ("0.9.2+cpu", False),
        ("0.26.0", True),
        ("0.33.0rc1", True),
        ("1.0.0", True),
        ("0.1.dev7", True),
    ],
)
def test_versions(version, served):
    problem = compat.problem(version)
    assert (problem is None) == served
    assert served or f"needs vLLM 0.26 or newer, this is {version}" in problem


def test_old_vllm_refuses_our_checkpoints_only():
    """In a process of its own: what is registered stays."""
    code = """
import vllm, vllm_ext
vllm.__version__ = "0.25.1"
vllm_ext.register(), vllm_ext.register()
from vllm.model_executor.layers.quantization import get_quantization_config
get_quantization_config("gptq")
get_quantization_config("qalora").from_config({"quant_method": "qalora"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert "QALoraError: qalora needs vLLM 0.26 or newer, this is 0.25.1. Update it" in done.stderr


def test_a_vllm_in_which_something_has_moved_refuses_our_checkpoints_only():
    """In a process of its own. vLLM calls a plugin unguarded: an ImportError ended every server."""
    code = """
import sys, vllm, vllm_ext, vllm.model_executor.kernels.linear
sys.modules["vllm.model_executor.kernels.linear.mixed_precision.machete"] = None
vllm_ext.register(), vllm_ext.register()
from vllm.model_executor.layers.quantization import get_quantization_config
get_quantization_config("gptq")
print("gptq is served")
get_quantization_config("qalora").from_config({"quant_method": "qalora"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert "gptq is served" in done.stdout
    assert "QALoraError: qalora does not run under vLLM" in done.stderr
    assert "machete" in done.stderr.splitlines()[-1]


def test_importing_the_package_imports_no_vllm():
    subprocess.run([sys.executable, "-c", "import sys, vllm_ext; assert 'vllm' not in sys.modules"], check=True)
