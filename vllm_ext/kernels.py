"""vLLM's own mixed-precision kernels, for the first term ``x·[scales·(q − zeros)]``: choose one, hand over."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.parameter import PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from qalora_plugin.quant.layout import pack_rows

logger = init_logger("vllm.qalora")  # below "vllm", whose handlers show it

# (bits, symmetric) → type of the codes; 2 and 3 bits have no kernel
_WEIGHT_TYPES = {
    (4, True): scalar_types.uint4b8,
    (4, False): scalar_types.uint4,
    (8, True): scalar_types.uint8b128,
    (8, False): scalar_types.uint8,
}


def choose_kernel(
    bits: int,
    symmetric: bool,
    group_size: int,
    act_dtype: torch.dtype,
    full_shape: tuple[int, int],
    shape: tuple[int, int],
) -> MPLinearKernel | None:
    """The kernel that vLLM prefers for such a layer on this machine, or None if there is none.

    Args:
        group_size: −1 for one group over all of K.
        full_shape: ``(K, N)`` of the whole layer. shape: of this rank's share.
    """
    kind = f"{bits}-bit {'symmetric' if symmetric else 'asymmetric'} weights, group size {group_size}, {act_dtype}"
    try:
        kernel = _choose(bits, symmetric, group_size, act_dtype, full_shape, shape)
    except ValueError as error:
        logger.warning_once("qalora: no fast kernel for %s, using plain torch (slow): %s", kind, str(error))
        return None
    logger.info_once("qalora: %s for %s", type(kernel).__name__, kind)
    return kernel


def _choose(bits, symmetric, group_size, act_dtype, full_shape, shape) -> MPLinearKernel:
    weight_type = _WEIGHT_TYPES.get((bits, symmetric))
    if weight_type is None:
        raise ValueError(f"no kernel takes {bits}-bit codes")
    if act_dtype not in (torch.float16, torch.bfloat16):  # not every kernel checks this itself
        raise ValueError(f"no kernel takes {act_dtype} activations")
    values = {
        "full_weight_shape": full_shape,
        "partition_weight_shape": shape,
        "weight_type": weight_type,
        "act_type": act_dtype,
        "group_size": group_size,
        "zero_points": not symmetric,
        "has_g_idx": False,  # columns are sorted at load; only older vLLM has this field
    }
    known = {field.name for field in dataclasses.fields(MPLinearLayerConfig)}
    config = MPLinearLayerConfig(**{name: value for name, value in values.items() if name in known})
    kernel_type = choose_mp_linear_kernel(config)
    if current_platform.is_cpu() and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        raise ValueError(f"{kernel_type.__name__} needs AVX512 or another instruction set that this CPU lacks")
    return kernel_type(config, w_q_param_name="qweight", w_s_param_name="scales", w_zp_param_name="qzeros")


def hand_over(kernel: MPLinearKernel, layer: nn.Module, zeros: Tensor, bits: int) -> None:
    """Give ``layer``'s loaded weights to ``kernel``, which repacks them. zeros: true zero-points, uint8 ``[G, N]``."""
    layer.scales.data = layer.scales.data.to(kernel.config.act_type)
    if kernel.config.zero_points:
        layer.qzeros = kernel_zeros(zeros, bits, layer.qzeros.weight_loader)
    kernel.process_weights_after_loading(layer)


def kernel_zeros(zeros: Tensor, bits: int, weight_loader: Callable) -> PackedvLLMParameter:
    """Zero-points ``[G, N]`` as kernels expect them: int32 ``[N·b/32, G]``, packed along N, without GPTQ's minus one.

    vLLM's AWQ and compressed-tensors layers store them so; Marlin and Conch rely on it, others look at ``output_dim``.
    """
    return PackedvLLMParameter(
        data=pack_rows(zeros.t(), bits),
        input_dim=1,
        output_dim=0,
        packed_dim=0,
        packed_factor=32 // bits,
        weight_loader=weight_loader,
    )
