"""Which kernel a layer gets on NVIDIA GPUs: vLLM's own choice for a compute capability, asked on any machine."""

import json
import subprocess
import sys

import pytest

# In a process of its own: it tells all of vLLM that it runs on that GPU. The kernels' classes are vLLM's; none is run.
CHOOSE = """
import json, sys, types
import vllm.platforms
try:
    import vllm._C_stable_libtorch
except ImportError:  # no CUDA ops in a build for CPUs, no libcuda on a machine without a GPU
    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("no CUDA ops")
from vllm.platforms.cuda import CudaPlatformBase
from vllm.platforms.interface import DeviceCapability
import torch
import vllm_ext.kernels.select

class Gpu(CudaPlatformBase):
    @classmethod
    def get_device_capability(cls, device_id=0):
        return DeviceCapability(*capability)

for module in list(sys.modules.values()):
    if module.__name__.startswith("vllm") and "current_platform" in vars(module):
        module.current_platform = Gpu()

found = []
for capability, bits, symmetric, group_size, dtype in json.loads(sys.argv[1]):
    shape = (4096, 4096)
    kind = vllm_ext.kernels.select.LayerKind(
        "layer", bits, symmetric, group_size, getattr(torch, dtype), shape, shape, has_offsets=True, sortable=True
    )
    path, kernel = vllm_ext.kernels.select.choose_path(kind, None)
    found.append([path, type(kernel).__name__, getattr(kernel, "config", None) and kernel.config.zero_points])
print("@@" + json.dumps(found))
"""
HOPPER, BLACKWELL, ADA, AMPERE, TURING = (9, 0), (10, 0), (8, 9), (8, 0), (7, 5)
MARLIN, MACHETE, FUSED = (
    ("kernel+offsets", "MarlinLinearKernel"), ("kernel+offsets", "MacheteLinearKernel"),
    ("fused-zeros", "FloatZeroKernel"),
)  # fmt: skip
CASES = {  # capability, bits, symmetric, group size, dtype → path, kernel, whether it takes zero-points
    **{(HOPPER, 4, True, g, "bfloat16"): (*MACHETE, False) for g in (64, 128, -1)},
    **{(HOPPER, 4, True, g, "float16"): (*FUSED, True) for g in (64, 128, -1)},
    **{(HOPPER, 4, False, g, dtype): (*FUSED, True) for g in (64, 128) for dtype in ("bfloat16", "float16")},
    (HOPPER, 4, True, 32, "bfloat16"): (*MARLIN, False),
    (HOPPER, 4, False, 32, "float16"): (*MARLIN, True),
    (HOPPER, 8, True, 128, "bfloat16"): (*MACHETE, False),
    (HOPPER, 8, False, 128, "bfloat16"): (*MACHETE, False),
    (HOPPER, 8, False, 32, "bfloat16"): (*MARLIN, False),
    **{
        (gpu, 4, symmetric, g, "bfloat16"): (*MARLIN, not symmetric)
        for gpu in (BLACKWELL, ADA, AMPERE)
        for symmetric in (True, False)
        for g in (32, 64, 128, -1)
    },
    **{(gpu, 8, symmetric, 64, "float16"): (*MARLIN, False) for gpu in (ADA, TURING) for symmetric in (True, False)},
    (TURING, 4, True, 128, "float16"): (*MARLIN, False),
    (AMPERE, 4, True, 256, "float16"): ("kernel+offsets", "ExllamaLinearKernel", False),
    (AMPERE, 3, False, 128, "float16"): ("dense", "NoneType", None),
}


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-c", CHOOSE, json.dumps(list(CASES))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.split("@@")[1]), strict=True))


@pytest.mark.parametrize("case", list(CASES), ids=str)
def test_kernel_of_a_gpu(found, case):
    path, kernel, zero_points = found[case]
    if kernel == "HummingLinearKernel" and case[0] == HOPPER:  # vLLM 0.33 brings it and takes it instead of Marlin
        kernel = "MarlinLinearKernel"
    assert (path, kernel, zero_points) == CASES[case]
