"""INT4 linears on a CPU with the offsets inside: ``x·[scales·(q − 8) + zeros]``, zeros any float, by torch's kernel.

torch's int4 product (``aten::_weight_int4pack_mm_for_cpu``, bfloat16, AVX512 or AVX2) takes a float zero for each
group, so no second term is left. Up to 128 rows run on it: one row in 0.4 of the time of vLLM's kernel, 128 rows in
1.15 of it (two cores, AVX512). It unpacks the weight again for every few rows, so more rows run on a dense GEMM, over a
weight that is unpacked once, offsets included, into a buffer that all layers share: 512 rows in 0.7 of that time.
Without AVX512, vLLM has no kernel at all.

``scales·(8 − z) + offsets`` is rounded to bfloat16 once. For a symmetric base that rounds the offsets alone; for an
asymmetric one z is near 8, and log-probabilities were as close to float32's as with vLLM's kernel (0.0026 both).
"""

from functools import cache

import torch
from torch import Tensor, nn

from qalora_plugin.core.packing import unpack_rows
from qalora_plugin.kernels.hardware import gemm_dtype
from qalora_plugin.kernels.workspace import scratch
from vllm_ext.compat import Layer
from vllm_ext.kernels import amx

GROUP_SIZES = (32, 64, 128, 256)
FEW_ROWS = 128
_CACHED = 1 << 20  # elements unpacked at a time, so that what lies between the steps stays in the cache


class Int4PackKernel:
    """Stands where one of vLLM's mixed-precision kernels would; shape ``(K, N)``, ``group_size`` columns a group."""

    def __init__(self, shape: tuple[int, int], group_size: int):
        self.shape, self.group_size = shape, group_size

    @staticmethod
    def why_not(bits: int, act_dtype: torch.dtype, shape: tuple[int, int], group_size: int) -> str | None:
        """Why torch's kernel cannot run such a layer here; None if it can."""
        if bits != 4 or act_dtype != torch.bfloat16:
            return f"torch's int4 kernel takes 4 bits and bfloat16, not {bits} bits and {act_dtype}"
        block = columns_of_a_block()
        if block is None:
            return "torch packs int4 weights differently on this CPU"
        if group_size not in GROUP_SIZES or shape[1] % block:
            return (
                f"torch's int4 kernel takes groups of {GROUP_SIZES} and N in {block}s, not {group_size} and {shape[1]}"
            )
        return None

    def hand_over(self, layer: Layer, zeros: Tensor, bits: int, offsets: Tensor) -> None:
        """Repack ``layer``'s loaded weights. zeros: true zero-points, uint8 ``[G, N]``. offsets: ``[G, N]``."""
        amx.request()
        scales = layer.scales.data.float()
        folded = offsets.float() - scales * (zeros.float() - 8)
        pairs = torch.stack([scales, folded], dim=-1).bfloat16()
        packed = pack(unpack_rows(layer.qweight.data, bits), _block())
        layer.qweight = nn.Parameter(packed, requires_grad=False)
        layer.scales = nn.Parameter(pairs, requires_grad=False)

    def apply_weights(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., K] → [..., N]``."""
        y = torch.ops.qalora.int4_linear(x.reshape(-1, x.shape[-1]), layer.qweight, layer.scales, self.group_size)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if bias is None else y + bias


def int4_linear(x: Tensor, weight: Tensor, scales_and_zeros: Tensor, group_size: int) -> Tensor:
    """``x [M, K] → [M, N]``. weight: from :func:`pack`. scales_and_zeros: bfloat16 ``[G, N, 2]``."""
    if x.shape[0] <= FEW_ROWS:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), weight, group_size, scales_and_zeros)
    dtype = gemm_dtype(x.dtype, x.device)
    k, n = x.shape[1], scales_and_zeros.shape[1]
    with scratch(k, n, dtype, weight.device) as out:
        return (x.to(dtype) @ unpack(weight, scales_and_zeros, group_size, out)).to(x.dtype)


def int4_linear_fake(x: Tensor, weight: Tensor, scales_and_zeros: Tensor, group_size: int) -> Tensor:
    return x.new_empty(x.shape[0], scales_and_zeros.shape[1])


def pack(codes: Tensor, block: int) -> Tensor:
    """Codes 0 … 15, uint8 ``[K, N]`` → what torch's kernel reads: uint8 ``[N, K/2]``.

    Does what ``aten::_convert_weight_to_int4pack_for_cpu`` does, in a tenth of its time.

    Args:
        block: :func:`columns_of_a_block`; a byte holds two columns, half a block apart.
    """
    k, n = codes.shape
    low, high = codes.view(k, n // block, 2, block // 2).transpose(0, 1).unbind(2)
    return (low | high << 4).reshape(n, k // 2)


@cache
def columns_of_a_block() -> int | None:
    """Columns that lie side by side in torch's packed weight: 64 with AVX512, 32 with AVX2; None if it is neither."""
    codes = torch.arange(32 * 128).remainder(37).remainder(16).view(32, -1)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().int().contiguous(), 1)
    return next((block for block in (64, 32) if torch.equal(theirs, pack(codes.to(torch.uint8), block))), None)


def _block() -> int:
    """:func:`columns_of_a_block`, where ``why_not`` has found it to be known."""
    found = columns_of_a_block()
    assert found is not None
    return found


def unpack(weight: Tensor, scales_and_zeros: Tensor, group_size: int, out: Tensor) -> Tensor:
    """The dense weight ``[K, N]``, rounded once, in ``out``: a buffer of that size."""
    groups, n, _ = scales_and_zeros.shape
    block = _block()
    blocks, half = n // block, block // 2
    packed = weight.view(blocks, groups, group_size, half).transpose(0, 1)
    scales, zeros = scales_and_zeros.float().view(groups, blocks, 1, 2, half, 2).unbind(-1)
    zeros = zeros - 8 * scales
    out = out.view(groups, group_size, blocks, 2, half).transpose(1, 2)
    step = max(1, _CACHED // (group_size * n))
    for first in range(0, groups, step):
        rows = slice(first, first + step)
        for i, codes in enumerate((packed[rows] & 15, packed[rows] >> 4)):
            out[rows, :, :, i] = torch.addcmul(zeros[rows, :, :, i], codes, scales[rows, :, :, i])
    return out.transpose(1, 2).reshape(-1, n)
