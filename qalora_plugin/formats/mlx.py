"""MLX's affine quantization, as mlx-lm loads it: ``weight scales biases``. Written only.

    w[n,k] = scales[n,γ]·q[n,k] + biases[n,γ]          biases = offsets − scales·zeros

``weight`` uint32 [N, K·b/32] is a little-endian bit stream of codes along K, GPTQ's words transposed, at 2, 3, 4 and 8
bits; ``scales`` and ``biases`` [N, G]. (mlx ``ops.cpp`` ``affine_quantize``, mlx-lm ``utils.py`` ``load_model``.) MLX
has groups of 32, 64 and 128: a larger group is written as several that say the same.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qalora_plugin.checkpoint.module_names import is_expert
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.qalora import WEIGHTS_KEY

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZES = (128, 64, 32)
DTYPES = ("float32", "float16", "bfloat16")


class Mlx:
    """How linears are written.

    Attributes:
        dtype: of scales and biases, one of :data:`DTYPES`.
    """

    def __init__(self, dtype: str = "float32"):
        if dtype not in DTYPES:
            raise QALoraError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}.")
        self.dtype = dtype

    def require(self, spec: GroupwiseSpec, act_order: bool, where: object) -> None:
        """
        Raises:
            Unsupported: MLX, or mlx-lm, has no place for this linear.
        """
        if is_expert(spec.name):
            raise Unsupported(
                f"{where}: {spec.name} is one expert of many, which mlx-lm wants stacked: that is not written yet.",
                "Export gguf, or gptq8 for vLLM.",
            )
        if act_order:
            raise Unsupported(
                f"{where}: {spec.name} is in act-order, which MLX has no index for.",
                "Quantize the base without act-order and train on that, or export gptq8, which re-quantizes.",
            )
        if not any(spec.group_size % size == 0 for size in GROUP_SIZES):
            raise Unsupported(
                f"{where}: {spec.name} has group size {spec.group_size}; MLX has groups of 32, 64 and 128.",
                "Quantize the base with one of these and train on that, or export gptq8, which re-quantizes.",
            )

    def write(self, name: str, weight: GroupwiseWeight) -> "dict[str, Tensor]":
        """The tensors of one linear but its bias, by their names on disk.

        Raises:
            QALoraError: a scale or bias exceeds the dtype.
        """
        import torch

        scales, biases = affine(weight)
        repeats = weight.group_size // group_size(weight.group_size)
        stored = {"scales": scales, "biases": biases}
        for part, exact in stored.items():
            stored[part] = exact.to(getattr(torch, self.dtype)).t().repeat_interleave(repeats, 1).contiguous()
            if not stored[part].isfinite().all():
                raise QALoraError(f"{name}: its {part} exceed what {self.dtype} can hold. Use dtype float32.")
        return {
            f"{name}.weight": weight.qweight.t().contiguous().view(torch.uint32),
            f"{name}.scales": stored["scales"],
            f"{name}.biases": stored["biases"],
        }


def affine(weight: GroupwiseWeight) -> "tuple[Tensor, Tensor]":
    """Scales and biases in float64, ``[G, N]``."""
    scales = weight.scales.double()
    biases = -scales * weight.zeros.double()
    return scales, biases if weight.offsets is None else biases + weight.offsets.double()


def group_size(size: int) -> int:
    """The largest of MLX's groups that divides one of ours."""
    return next(found for found in GROUP_SIZES if size % found == 0)


def quantization(specs: Iterable[GroupwiseSpec]) -> dict[str, Any]:
    """``quantization`` of ``config.json``: what most linears have, and the others by name."""
    kinds = {spec.name: (group_size(spec.group_size), spec.bits) for spec in specs}
    common, _ = Counter(kinds.values()).most_common(1)[0]
    own = {name: _settings(*kind) for name, kind in kinds.items() if kind != common}
    return _settings(*common) | own


def as_config(config: dict[str, Any], specs: Iterable[GroupwiseSpec]) -> dict[str, Any]:
    """``config.json`` for mlx-lm, from that of a quantized checkpoint."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", WEIGHTS_KEY)}
    kept = with_classic_rope(kept) | {"quantization": quantization(specs)}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = with_classic_rope(text)
    return kept


def with_classic_rope(config: dict[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and its like beside transformers 5's ``rope_parameters``.

    Most models of mlx-lm look for the former, and without it silently take a default, and rotate wrongly.
    """
    found = config.get("rope_parameters")
    if not isinstance(found, dict):
        return config
    rope, sliding = found.get("full_attention", found), found.get("sliding_attention")
    if not isinstance(rope, dict):
        return config
    classic = {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    if isinstance(sliding, dict):
        classic["rope_local_base_freq"] = sliding.get("rope_theta")
    if (kind := rope.get("rope_type", "default")) != "default":
        classic["rope_scaling"] = {**rope, "type": kind}
    return config | {key: value for key, value in classic.items() if value is not None and config.get(key) is None}


def _settings(size: int, bits: int) -> dict[str, Any]:
    return {"group_size": size, "bits": bits}
