"""What this machine's vLLM can do: its INT4 kernel for CPUs needs AVX512, and the tests run on others, too."""

import pytest
import torch
import vllm._custom_ops  # noqa: F401 (loads vLLM's ops)
from vllm.platforms import current_platform

HAS_KERNEL = not current_platform.is_cpu() or hasattr(torch.ops._C, "cpu_gemm_wna16")
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="vLLM has no INT4 kernel for this CPU (no AVX512)")
