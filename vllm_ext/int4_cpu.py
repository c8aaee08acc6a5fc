"""INT4 linears on a CPU with the offsets inside: ``x·[scales·(q − 8) + zeros]``, zeros any float, by torch's kernel.

torch's int4 product (``aten::_weight_int4pack_mm_for_cpu``, bfloat16, AVX512) takes a float zero for each group, so no
second term is left. Up to 128 rows run on it: one row in 0.4 of the time of vLLM's kernel, 128 rows in 1.15 of it. It
unpacks the weight again for every few rows, so more rows run on a dense GEMM, over a weight that is unpacked once,
offsets included, into a buffer that all layers share: 512 rows in 0.7 of that time. Measured on two cores.

``scales·(8 − z) + offsets`` is rounded to bfloat16 once. For a symmetric base that rounds the offsets alone; for an
asymmetric one z is near 8, and log-probabilities were as close to float32's as with vLLM's kernel (0.0026 both).
"""

from functools import cache

import torch
from torch import Tensor, nn

from qalora_plugin.quant.layout import unpack_rows

GROUP_SIZES = (32, 64, 128, 256)
_BLOCK = 64  # columns of W side by side in the packed weight; a byte holds columns d and d + 32 of a block
FEW_ROWS = 128
_CACHED = 1 << 20  # elements unpacked at a time, so that what lies between the steps stays in the cache
_scratch: dict[int, Tensor] = {}


class Int4PackKernel:
    """Stands where one of vLLM's mixed-precision kernels would; shape ``(K, N)``, ``group_size`` columns a group."""

    def __init__(self, shape: tuple[int, int], group_size: int):
        self.shape, self.group_size = shape, group_size

    @staticmethod
    def why_not(bits: int, act_dtype: torch.dtype, shape: tuple[int, int], group_size: int) -> str | None:
        """Why torch's kernel cannot run such a layer here; None if it can."""
        if bits != 4 or act_dtype != torch.bfloat16:
            return f"torch's int4 kernel takes 4 bits and bfloat16, not {bits} bits and {act_dtype}"
        if group_size not in GROUP_SIZES or shape[1] % _BLOCK:
            return (
                f"torch's int4 kernel takes groups of {GROUP_SIZES} and N in {_BLOCK}s, not {group_size} and {shape[1]}"
            )
        return None if _layout_is_known() else "torch packs int4 weights differently on this CPU"

    def hand_over(self, layer: nn.Module, zeros: Tensor, bits: int, offsets: Tensor) -> None:
        """Repack ``layer``'s loaded weights. zeros: true zero-points, uint8 ``[G, N]``. offsets: ``[G, N]``."""
        scales = layer.scales.data.float()
        folded = offsets.float() - scales * (zeros.float() - 8)
        pairs = torch.stack([scales, folded], dim=-1).bfloat16()
        layer.qweight = nn.Parameter(pack(unpack_rows(layer.qweight.data, bits)), requires_grad=False)
        layer.scales = nn.Parameter(pairs, requires_grad=False)
        layer.qzeros = None

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., K] → [..., N]``."""
        y = torch.ops.vllm.qalora_int4_linear(x.reshape(-1, x.shape[-1]), layer.qweight, layer.scales, self.group_size)
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


def int4_linear(x: Tensor, weight: Tensor, scales_and_zeros: Tensor, group_size: int) -> Tensor:
    """``x [M, K] → [M, N]``. weight: from :func:`pack`. scales_and_zeros: bfloat16 ``[G, N, 2]``."""
    if x.shape[0] <= FEW_ROWS:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), weight, group_size, scales_and_zeros)
    return x @ dense_weight(weight, scales_and_zeros, group_size)


def int4_linear_fake(x: Tensor, weight: Tensor, scales_and_zeros: Tensor, group_size: int) -> Tensor:
    return x.new_empty(x.shape[0], scales_and_zeros.shape[1])


def pack(codes: Tensor) -> Tensor:
    """Codes 0 … 15, uint8 ``[K, N]`` → what torch's kernel reads: uint8 ``[N, K/2]``.

    Does what ``aten::_convert_weight_to_int4pack_for_cpu`` does, in a tenth of its time.
    """
    k, n = codes.shape
    low, high = codes.view(k, n // _BLOCK, 2, _BLOCK // 2).transpose(0, 1).unbind(2)
    return (low | high << 4).reshape(n, k // 2)


def dense_weight(weight: Tensor, scales_and_zeros: Tensor, group_size: int) -> Tensor:
    """bfloat16 ``[K, N]``, rounded once, in the shared buffer: use it before the next call."""
    groups, n, _ = scales_and_zeros.shape
    blocks, half = n // _BLOCK, _BLOCK // 2
    packed = weight.view(blocks, groups, group_size, half).transpose(0, 1)
    scales, zeros = scales_and_zeros.float().view(groups, blocks, 1, 2, half, 2).unbind(-1)
    zeros = zeros - 8 * scales
    out = _buffer(groups * group_size * n).view(groups, group_size, blocks, 2, half).transpose(1, 2)
    step = max(1, _CACHED // (group_size * n))
    for first in range(0, groups, step):
        rows = slice(first, first + step)
        for i, codes in enumerate((packed[rows] & 15, packed[rows] >> 4)):
            out[rows, :, :, i] = torch.addcmul(zeros[rows, :, :, i], codes, scales[rows, :, :, i])
    return out.transpose(1, 2).reshape(-1, n)


def _buffer(size: int) -> Tensor:
    if not _scratch or _scratch[0].numel() < size:
        with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
            _scratch[0] = torch.empty(size, dtype=torch.bfloat16)
    return _scratch[0][:size]


@cache
def _layout_is_known() -> bool:
    """Whether torch packs here as :func:`pack` does: its layout depends on the CPU's vector width."""
    codes = torch.arange(32 * 2 * _BLOCK).remainder(37).remainder(16).view(32, -1)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().int().contiguous(), 1)
    return torch.equal(theirs, pack(codes.to(torch.uint8)))
