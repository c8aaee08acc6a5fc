"""AWQ checkpoints in AutoAWQ's ``gemm`` layout: ``qweight qzeros scales``, 4 bits, words along N.

A word of ``qweight`` [K, N/8] and ``qzeros`` [G, N/8] holds eight columns in the order 0 2 4 6 1 3 5 7; zero-points are
stored as they are. (AutoAWQ ``modules/linear/gemm.py``, ``utils/packing_utils.py``; AutoRound ``export_to_awq``.)
What has a ``qweight`` is quantized, so ``modules_to_not_convert`` needs no rule of its own. Read only.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.checkpoint.tensors import TensorInfo, all_finite
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.formats.base import Headers, Unsupported, refuse_changed_activations

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
_COLUMNS = 32 // BITS  # of a word
_FIELD_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]
_SYMMETRIC = np.frombuffer(b"\x88" * 4, "<i4")[0]  # a word of zero-points that are all 8
_BLOCK = 2048  # columns that are unpacked at a time
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_OTHERWISE = (
    "Use the checkpoint's gemm version, or make a GPTQ checkpoint of the original 16-bit model: "
    "qalora quantize MODEL OUT."
)


class Awq:
    """A :class:`~.base.CheckpointFormat`, read only."""

    method = "awq"
    reading = "gemm"

    def __init__(self, quantization: dict[str, Any], where: object = "quantization_config"):
        """
        Raises:
            Unsupported: another of AWQ's layouts, other than 4 bits, or activations that are quantized or rotated.
        """
        found = quantization.get("version") or quantization.get("format") or self.reading
        if str(found).lower() != self.reading or quantization.get("backend") == "llm-awq":
            kind = "llm-awq" if quantization.get("backend") == "llm-awq" else found
            raise Unsupported(f"{where} is AWQ of version {short(kind)}, expected 'gemm'.", _OTHERWISE)
        bits = quantization.get("bits", quantization.get("w_bit", BITS))
        if bits != BITS:
            raise Unsupported(f"{where} is AWQ with bits {short(bits)}: the gemm layout is of 4 bits.", _OTHERWISE)
        refuse_changed_activations(quantization, where, _OTHERWISE)
        self.quantization = quantization

    @classmethod
    def detect(cls, quantization: dict[str, Any]) -> bool:
        method, packing = quantization.get("quant_method"), quantization.get("packing_format")
        return method == cls.method or (method == "auto-round" and isinstance(packing, str) and "awq" in packing)

    def specs(self, tensors: Headers, where: object) -> dict[str, GroupwiseSpec]:
        names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        if not names:
            raise QALoraError(f"{where} holds no quantized linear (no *.qweight). Is it the right folder?")
        scaled = (name for name in tensors if name.endswith(".scales") and f"{name[:-6]}qweight" not in tensors)
        if found := next(scaled, None):
            raise Unsupported(
                f"{where}: {found} divides an activation, as AutoAWQ does where no norm comes before a linear, and "
                "GPTQ has no place for that.",
                "Make a GPTQ checkpoint of the original 16-bit model: qalora quantize MODEL OUT.",
            )
        return {name: self._spec(tensors, name, where) for name in names}

    def parts(self, spec: GroupwiseSpec) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales", *(("bias",) if spec.bias_dtype else ()))

    def read(self, spec: GroupwiseSpec, load: "Callable[[str], Tensor]") -> GroupwiseWeight:
        import torch

        from qalora_plugin.core.packing import pack_rows

        words = load(f"{spec.name}.qweight")
        qweight = torch.empty(spec.in_features * BITS // 32, spec.out_features, dtype=torch.int32, device=words.device)
        for start in range(0, spec.out_features, _BLOCK):
            block = unpack_columns(words[:, start // _COLUMNS : (start + _BLOCK) // _COLUMNS])
            qweight[:, start : start + _BLOCK] = pack_rows(block, BITS)
        return GroupwiseWeight(
            qweight=qweight,
            zeros=unpack_columns(load(f"{spec.name}.qzeros")),
            scales=load(f"{spec.name}.scales"),
            offsets=None,
            g_idx=None,
            group_order=None,
            bits=BITS,
            group_size=spec.group_size,
        )

    def write(self, name: str, weight: GroupwiseWeight, g_idx: bool = True) -> "dict[str, Tensor]":
        raise Unsupported(
            f"{name}: AWQ is read, not written: its integer zero-points cannot hold offsets.",
            "Export gptq8 for stock tools, gguf or mlx without loss.",
        )

    def check_values(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray], where: object) -> None:
        for part in ("scales", *(("bias",) if spec.bias_dtype else ())):
            if not all_finite(load(f"{spec.name}.{part}")):
                raise QALoraError(
                    f"{where}: {spec.name}.{part} holds NaN or Inf. Download or copy the checkpoint again, or quantize "
                    "the model again."
                )

    def is_symmetric(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray]) -> bool:
        return bool((load(f"{spec.name}.qzeros") == _SYMMETRIC).all())

    def _spec(self, tensors: Headers, name: str, where: object) -> GroupwiseSpec:
        def fail(problem: str) -> QALoraError:
            return QALoraError(f"{where}: {name}: {problem} The checkpoint is damaged or not in AWQ's gemm layout.")

        parts = {part: tensors.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "bias")}
        qweight, qzeros, scales = (_two_dimensions(part, parts[part], fail) for part in ("qweight", "qzeros", "scales"))
        (in_features, words), (groups, out_features) = qweight, scales
        if words * _COLUMNS != out_features or qzeros != (groups, words):
            raise fail(f"qweight {qweight} and qzeros {qzeros} do not fit scales {scales} at 4 bits.")
        if in_features % groups:
            raise fail(f"{groups} groups do not divide in_features {in_features}.")
        stated = self.quantization.get("group_size", self.quantization.get("q_group_size"))
        if stated not in (None, -1, in_features // groups):
            raise QALoraError(
                f"{where}: {name} is stored with group size {in_features // groups}, its quantization config says "
                f"{short(stated)}. One of the two is from another checkpoint."
            )
        bias = parts["bias"]
        if bias is not None and (bias.shape != (out_features,) or bias.dtype not in _FLOATS):
            raise fail(f"bias is {bias.dtype} {bias.shape}, expected {out_features} floats.")
        return GroupwiseSpec(
            name=name,
            in_features=in_features,
            out_features=out_features,
            bits=BITS,
            group_size=in_features // groups,
            scale_dtype=_FLOATS[tensors[f"{name}.scales"].dtype],
            bias_dtype=None if bias is None else _FLOATS[bias.dtype],
        )


def _two_dimensions(part: str, found: TensorInfo | None, fail: Callable[[str], QALoraError]) -> tuple[int, int]:
    """The shape of words, or of scales."""
    if found is None:
        raise fail(f"the tensor {part} is missing.")
    expected = tuple(_FLOATS) if part == "scales" else ("I32",)
    if found.dtype not in expected:
        raise fail(f"{part} is {found.dtype}, expected {' or '.join(expected)}.")
    if len(found.shape) != 2 or 0 in found.shape:
        raise fail(f"{part} has shape {found.shape}, expected two dimensions.")
    rows, columns = found.shape
    return rows, columns


def unpack_columns(words: "Tensor") -> "Tensor":
    """int32 ``[R, N/8]`` → uint8 codes ``[R, N]``, columns in their order."""
    import torch

    shifts = BITS * torch.tensor(_FIELD_OF_COLUMN, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << BITS) - 1)).to(torch.uint8).flatten(1)
