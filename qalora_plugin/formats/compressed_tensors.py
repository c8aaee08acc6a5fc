"""compressed-tensors' ``pack-quantized`` checkpoints, as llm-compressor writes them: weights alone, 2, 3, 4 or 8 bits.

``weight_packed`` [N, ⌈K/f⌉] holds f = 32//b codes a word, stored as q + 2^(b−1) of the signed q: at 2, 4 and 8 bits
these are GPTQ's words transposed; at 3 bits two bits of a word stay empty. ``weight_scale`` [N, G];
``weight_zero_point`` [⌈N/f⌉, G] packed likewise along N (int8 [N, G] in older files), absent where it is symmetric;
``weight_g_idx`` [K] with act-order. (compressed-tensors ``compressors/pack_quantized``.) Headers do not say how many
columns the last word holds, so bits and group size come from ``config_groups``, whichever of them the shapes fit. Read
only.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_plugin.checkpoint.tensors import TensorInfo, all_finite
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.formats.base import Headers, Unsupported
from qalora_plugin.formats.compressed_tensors_config import OTHERWISE, Scheme, schemes

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 2048  # rows of N that are unpacked at a time
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_DTYPES = {
    "weight_packed": ("I32",),
    "weight_scale": tuple(_FLOATS),
    "weight_zero_point": ("I32", "I8"),
    "weight_shape": ("I64", "I32"),
    "weight_g_idx": ("I32", "I64"),
    "bias": tuple(_FLOATS),
}
_REQUIRED = ("weight_packed", "weight_scale", "weight_shape")


class CompressedTensors:
    """A :class:`~.base.CheckpointFormat`, read only.

    Attributes:
        schemes: the settings that ``config_groups`` names.

    How zero-points are stored a spec has no place for: an instance remembers it from :meth:`specs`, and reads no other
    checkpoint.
    """

    method = "compressed-tensors"
    reading = "pack-quantized"

    def __init__(self, quantization: dict[str, Any], where: object = "quantization_config"):
        """
        Raises:
            Unsupported: more is quantized than weights, or they are stored in another way.
            QALoraError: the config is not one of compressed-tensors.
        """
        self.schemes = schemes(quantization, where)
        self._zero_dtypes: dict[str, str] = {}

    @classmethod
    def detect(cls, quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == cls.method

    def specs(self, tensors: Headers, where: object) -> dict[str, GroupwiseSpec]:
        names = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
        if not names:
            raise QALoraError(f"{where} holds no quantized linear (no *.weight_packed). Is it the right folder?")
        for name in tensors:
            if name.endswith(".weight_scale") and f"{name.removesuffix('scale')}packed" not in tensors:
                raise Unsupported(f"{where}: {name} is of a weight that is not packed integers.", OTHERWISE)
        return {name: self._spec(tensors, name, where) for name in names}

    def parts(self, spec: GroupwiseSpec) -> tuple[str, ...]:
        stored = {
            "weight_zero_point": spec.name in self._zero_dtypes,
            "weight_g_idx": spec.has_g_idx,
            "bias": spec.bias_dtype,
        }
        return (*_REQUIRED, *(part for part, there in stored.items() if there))

    def read(self, spec: GroupwiseSpec, load: "Callable[[str], Tensor]") -> GroupwiseWeight:
        import torch

        g_idx, order = None, None
        if spec.has_g_idx:
            stored = load(f"{spec.name}.weight_g_idx").int()
            in_order = torch.arange(spec.in_features, dtype=torch.int32, device=stored.device) // spec.group_size
            if not (stored == -1).all() and not torch.equal(stored, in_order):  # −1: prepared for act-order, not used
                g_idx, order = stored, torch.argsort(stored, stable=True)
        return GroupwiseWeight(
            qweight=_transposed_words(load(f"{spec.name}.weight_packed"), spec),
            zeros=self._zeros(spec, load),
            scales=load(f"{spec.name}.weight_scale").t().contiguous(),
            offsets=None,
            g_idx=g_idx,
            group_order=order,
            bits=spec.bits,
            group_size=spec.group_size,
        )

    def write(self, name: str, weight: GroupwiseWeight, g_idx: bool = True) -> "dict[str, Tensor]":
        raise Unsupported(
            f"{name}: compressed-tensors is read, not written: its integer zero-points cannot hold offsets.",
            "Export gptq8 for stock tools, gguf or mlx without loss.",
        )

    def check_values(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray], where: object) -> None:
        shape = load(f"{spec.name}.weight_shape").tolist()
        if shape != [spec.out_features, spec.in_features]:
            raise Unsupported(
                f"{where}: {spec.name} is of shape {shape}, stored as {[spec.out_features, spec.in_features]}: it was "
                "padded, which GPTQ cannot hold, or the two are of different checkpoints.",
                OTHERWISE,
            )
        for part in ("weight_scale", *(("bias",) if spec.bias_dtype else ())):
            if not all_finite(load(f"{spec.name}.{part}")):
                raise QALoraError(
                    f"{where}: {spec.name}.{part} holds NaN or Inf. Download or copy the checkpoint again, or quantize "
                    "the model again."
                )
        if self._zero_dtypes.get(spec.name) == "I8":
            zeros, bound = load(f"{spec.name}.weight_zero_point"), 1 << (spec.bits - 1)
            if zeros.min() < -bound or zeros.max() >= bound:
                raise QALoraError(
                    f"{where}: {spec.name}.weight_zero_point exceeds {spec.bits} bits. Download or copy the checkpoint "
                    "again."
                )
        if spec.has_g_idx:
            stored = load(f"{spec.name}.weight_g_idx")
            counts = np.bincount(stored.clip(-1, spec.groups) + 1)
            if not (stored == -1).all() and counts.tolist() != [0] + [spec.group_size] * spec.groups:
                raise QALoraError(
                    f"{where}: {spec.name}.weight_g_idx does not put exactly {spec.group_size} columns into each of "
                    f"{spec.groups} groups. Download or copy the checkpoint again."
                )

    def is_symmetric(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray]) -> bool:
        stored = self._zero_dtypes.get(spec.name)
        if stored is None:
            return True
        zeros = load(f"{spec.name}.weight_zero_point")
        if stored == "I8":
            return not zeros.any()
        zeros = zeros.T[..., None] >> np.arange(32 // spec.bits) * spec.bits & ((1 << spec.bits) - 1)
        return bool((zeros.reshape(spec.groups, -1)[:, : spec.out_features] == 1 << (spec.bits - 1)).all())

    def is_act_order(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray]) -> bool:
        """Whether columns were quantized out of order."""
        if not spec.has_g_idx:
            return False
        stored = load(f"{spec.name}.weight_g_idx")
        return not (stored == -1).all() and not np.array_equal(stored, np.arange(spec.in_features) // spec.group_size)

    def _zeros(self, spec: GroupwiseSpec, load: "Callable[[str], Tensor]") -> "Tensor":
        """uint8 ``[G, N]``."""
        import torch

        stored = self._zero_dtypes.get(spec.name)
        if stored is None:
            return torch.full((spec.groups, spec.out_features), 1 << (spec.bits - 1), dtype=torch.uint8)
        zeros = load(f"{spec.name}.weight_zero_point").t()
        if stored == "I8":
            return (zeros.int() + (1 << (spec.bits - 1))).to(torch.uint8).contiguous()
        return _unpack(zeros, spec.bits)[:, : spec.out_features].contiguous()

    def _spec(self, tensors: Headers, name: str, where: object) -> GroupwiseSpec:
        parts = {part: tensors.get(f"{name}.{part}") for part in _DTYPES}
        for part, found in parts.items():
            if found is None and part in _REQUIRED:
                raise _damaged(where, name, f"the tensor {part} is missing.")
            if found is not None and found.dtype not in _DTYPES[part]:
                raise _damaged(where, name, f"{part} is {found.dtype}, expected {' or '.join(_DTYPES[part])}.")
        packed, scales, zeros, g_idx, bias = (
            parts[part] for part in ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "bias")
        )
        assert packed is not None
        assert scales is not None
        if len(packed.shape) != 2 or len(scales.shape) != 2 or 0 in packed.shape + scales.shape:
            raise _damaged(where, name, f"weight_packed is {packed.shape}, weight_scale {scales.shape}: not matrices.")
        out_features, groups = scales.shape
        fitting = {fit for scheme in self.schemes if (fit := _fit(scheme, packed.shape, scales.shape, zeros))}
        if len(fitting) != 1:
            listed = "; ".join(map(str, self.schemes))
            if fitting:
                raise Unsupported(f"{where}: {name} fits several of the config_groups ({listed}).", OTHERWISE)
            raise _damaged(
                where, name,
                f"weight_packed {packed.shape}, weight_scale {scales.shape} and weight_zero_point "
                f"{zeros.shape if zeros else None} fit none of the config_groups ({listed}).",
            )  # fmt: skip
        ((bits, in_features),) = fitting
        for part, found, shape in (("weight_g_idx", g_idx, (in_features,)), ("bias", bias, (out_features,))):
            if found is not None and found.shape != shape:
                raise _damaged(where, name, f"{part} has shape {found.shape}, expected {shape}.")
        if zeros is not None:
            self._zero_dtypes[name] = zeros.dtype
        return GroupwiseSpec(
            name=name,
            in_features=in_features,
            out_features=out_features,
            bits=bits,
            group_size=in_features // groups,
            scale_dtype=_FLOATS[scales.dtype],
            bias_dtype=None if bias is None else _FLOATS[bias.dtype],
            has_g_idx=g_idx is not None,
        )


def _damaged(where: object, name: str, problem: str) -> QALoraError:
    return QALoraError(f"{where}: {name}: {problem} The checkpoint is damaged or not pack-quantized.")


def _fit(
    scheme: Scheme, packed: tuple[int, ...], scales: tuple[int, ...], zeros: TensorInfo | None
) -> tuple[int, int] | None:
    """Bits and in_features of a linear of these shapes, if it can be of this scheme."""
    per_word = 32 // scheme.bits
    (out_features, words), (rows, groups) = packed, scales
    most = words * per_word
    if scheme.group_size is None:
        in_features = most // codes_per_period(scheme.bits) * codes_per_period(scheme.bits)
        if groups != 1:
            return None
    else:
        in_features = groups * scheme.group_size
    stored = {None: None, "I8": (out_features, groups), "I32": (-(-out_features // per_word), groups)}
    fits = rows == out_features and most - per_word < in_features <= most
    if not fits or (zeros is not None and zeros.shape != stored[zeros.dtype]) or (zeros is None) > scheme.symmetric:
        return None
    return scheme.bits, in_features


def _transposed_words(packed: "Tensor", spec: GroupwiseSpec) -> "Tensor":
    """int32 ``[N, ⌈K/f⌉]`` → GPTQ's ``[K·b/32, N]``."""
    import torch

    from qalora_plugin.core.packing import pack_rows

    if 32 % spec.bits == 0:
        return packed.t().contiguous()
    words = torch.empty(spec.in_features * spec.bits // 32, spec.out_features, dtype=torch.int32, device=packed.device)
    for start in range(0, spec.out_features, _BLOCK):
        codes = _unpack(packed[start : start + _BLOCK], spec.bits)[:, : spec.in_features]
        words[:, start : start + _BLOCK] = pack_rows(codes.t(), spec.bits)
    return words


def _unpack(words: "Tensor", bits: int) -> "Tensor":
    """int32 ``[R, W]`` → uint8 ``[R, W·(32//b)]``."""
    import torch

    shifts = bits * torch.arange(32 // bits, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)
