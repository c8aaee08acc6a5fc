"""Zero-points in the form that vLLM's kernels unpack, read back as Marlin and as Machete do (both run on GPUs only)."""

import pytest
import torch
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_cols, unpack_quantized_values_into_int32
from vllm.model_executor.parameter import permute_param_layout_
from vllm.scalar_type import scalar_types

from qalora_plugin.formats.gptq_zeros import read_zeros, write_zeros
from vllm_ext.kernels.vllm import kernel_zeros

pytestmark = pytest.mark.usefixtures("one_rank")
GROUPS, N = 5, 64


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_kernels_read_back_the_true_zeros(bits, checkpoint_format):
    zeros = torch.randint(0, 2**bits, (GROUPS, N), generator=torch.Generator().manual_seed(0))  # 0 borrows in v1
    stored = write_zeros(zeros, bits, checkpoint_format)
    handed = kernel_zeros(read_zeros(stored, bits, checkpoint_format), bits)
    as_marlin = unpack_cols(handed.data.t(), bits, GROUPS, N)
    assert torch.equal(as_marlin.long(), zeros)
    permute_param_layout_(handed, input_dim=0, output_dim=1, packed_dim=1)
    weight_type = {4: scalar_types.uint4, 8: scalar_types.uint8}[bits]
    as_machete = unpack_quantized_values_into_int32(handed.data, weight_type, packed_dim=1)
    assert torch.equal(as_machete.long(), zeros)
