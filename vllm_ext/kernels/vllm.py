"""vLLM's own mixed-precision kernels, for the first term ``x·[scales·(q − zeros)]``: find one, hand it the weights."""

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MPLinearKernel, choose_mp_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision.machete import MacheteLinearKernel
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.parameter import PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from qalora_plugin.core.packing import pack_rows
from vllm_ext.compat import Layer, kernel_config
from vllm_ext.kernels import amx
from vllm_ext.kernels.cpu_int4 import Int4PackKernel

# (bits, with zero-points) → type of the codes; 2 and 3 bits have no kernel
_WEIGHT_TYPES = {
    (4, False): scalar_types.uint4b8,
    (4, True): scalar_types.uint4,
    (8, False): scalar_types.uint8b128,
    (8, True): scalar_types.uint8,
}
_PARAMETERS = {"w_q_param_name": "qweight", "w_s_param_name": "scales", "w_zp_param_name": "zero_points"}


class NoKernel(Exception):
    """No kernel of vLLM runs such a layer on this machine; the message says why."""


class FloatZeroKernel(MacheteLinearKernel):
    """Machete with the offsets inside: ``x·(scales·q + zeros)``, zeros any float, ``−scales·z + offsets`` here.

    Machete's "group zeros" are added after the multiplication by the scale and have the activations' dtype
    (``ops.machete_mm(b_group_zeros=…)``, Hopper, groups 64, 128 and −1); for an integer zero z, vLLM's class passes
    ``−scales·z``. By source of vLLM 0.26, 0.32 and 0.33; 0.33's op was run so on an H100 (benchmarks/results/gpu).
    """

    def hand_over(self, layer: Layer, zeros: Tensor, bits: int, offsets: Tensor) -> None:
        """Give ``layer``'s loaded weights to Machete. zeros: uint8 ``[G, N]``. offsets: ``[G, N]``."""
        hand_over(self, layer, zeros, bits)
        layer.zero_points.data.copy_(float_zeros(layer.scales.data, zeros, offsets))


def float_zeros(scales: Tensor, zeros: Tensor, offsets: Tensor) -> Tensor:
    """``−scales·zeros + offsets`` [G, N], rounded once to the dtype of ``scales`` (those that the kernel uses)."""
    return (offsets.float() - scales.float() * zeros.float()).to(scales.dtype)


def find_kernel(
    bits: int,
    zero_points: bool,
    group_size: int,
    act_dtype: torch.dtype,
    full_shape: tuple[int, int],
    shape: tuple[int, int],
) -> MPLinearKernel:
    """The kernel that vLLM prefers for such a layer on this machine.

    Args:
        zero_points: whether it is to take them; else it takes every zero to be ``2^(b−1)``.
        group_size: −1 for one group over all of K.
        full_shape: ``(K, N)`` of the whole layer. shape: of this rank's share.

    Raises:
        NoKernel: there is none.
    """
    weight_type = _WEIGHT_TYPES.get((bits, zero_points))
    if weight_type is None:
        raise NoKernel(f"no kernel takes {bits}-bit codes")
    if act_dtype not in (torch.float16, torch.bfloat16):  # not every kernel checks this itself
        raise NoKernel(f"no kernel takes {act_dtype} activations")
    config = kernel_config(
        full_weight_shape=full_shape,
        partition_weight_shape=shape,
        weight_type=weight_type,
        act_type=act_dtype,
        group_size=group_size,
        zero_points=zero_points,
    )
    try:
        kernel_type = choose_mp_linear_kernel(config)
    except ValueError as error:
        raise NoKernel(" ".join(str(error).split())) from error
    if current_platform.is_cpu():
        if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
            raise NoKernel(f"{kernel_type.__name__} needs AVX512 or another instruction set that this CPU lacks")
        amx.request()  # in bfloat16 it multiplies with tiles that it has not asked for
    return kernel_type(config, **_PARAMETERS)


def find_float_zero_kernel(
    bits: int, group_size: int, act_dtype: torch.dtype, full_shape: tuple[int, int], shape: tuple[int, int]
) -> FloatZeroKernel | Int4PackKernel:
    """The kernel of this machine that takes float zero-points; arguments and errors as in :func:`find_kernel`."""
    if current_platform.is_cpu():
        columns = shape[0] if group_size == -1 else group_size
        if reason := Int4PackKernel.why_not(bits, act_dtype, shape, columns):
            raise NoKernel(reason)
        return Int4PackKernel(shape, columns)
    kernel = find_kernel(bits, True, group_size, act_dtype, full_shape, shape)
    if type(kernel) is not MacheteLinearKernel:
        name = type(kernel).__name__
        raise NoKernel(f"{name} takes integer zero-points only (Machete, on Hopper, takes floats)")
    return FloatZeroKernel(kernel.config, **_PARAMETERS)


def hand_over(kernel: MPLinearKernel, layer: Layer, zeros: Tensor, bits: int) -> None:
    """Give ``layer``'s loaded weights to ``kernel``, which repacks them. zeros: true zero-points, uint8 ``[G, N]``."""
    layer.scales.data = layer.scales.data.to(kernel.config.act_type)
    if kernel.config.zero_points:
        layer.zero_points = kernel_zeros(zeros, bits)
    kernel.process_weights_after_loading(layer)


def moved_zeros(scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """``scales·(2^(b−1) − zeros)``, float32 ``[G, N]``: what a kernel leaves out that takes zeros to be ``2^(b−1)``."""
    return scales.float() * ((1 << (bits - 1)) - zeros.float())


def kernel_zeros(zeros: Tensor, bits: int) -> PackedvLLMParameter:
    """Zero-points ``[G, N]`` as kernels expect them: int32 ``[N·b/32, G]``, packed along N, without GPTQ's minus one.

    vLLM's AWQ and compressed-tensors layers store them so; Marlin and Conch rely on it, others look at ``output_dim``.
    """
    return PackedvLLMParameter(
        data=pack_rows(zeros.t(), bits),
        input_dim=1,
        output_dim=0,
        packed_dim=0,
        packed_factor=32 // bits,
        weight_loader=default_weight_loader,
    )
