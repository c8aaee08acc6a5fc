"""GPTQ checkpoints as AutoGPTQ, GPTQModel, AutoRound and llm-compressor write them: ``qweight qzeros scales g_idx``.

The shapes say everything (bits, group size, sizes), so ``dynamic``, ``modules_to_not_convert`` and a dense ``lm_head``
need no rules of their own: what has a ``qweight`` is quantized.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.checkpoint.tensors import TensorInfo, all_finite
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec, GroupwiseWeight
from qalora_plugin.core.words import SUPPORTED_BITS, codes_per_period
from qalora_plugin.formats.base import Headers, Unsupported, refuse_changed_activations
from qalora_plugin.formats.gptq_zeros import CHECKPOINT_FORMATS, V1, read_zeros, symmetric_words, write_zeros

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_FIELDS = {  # of quantization_config; None stands for "not given"
    "bits": int, "group_size": int, "desc_act": bool, "sym": bool, "lm_head": bool, "dynamic": dict,
    "quant_method": str, "checkpoint_format": str, "format": str, "offset_dtype": str, "serving_path": str,
    "modules_to_not_convert": list, "modules_in_block_to_quantize": list,
}  # fmt: skip
MERGED = ("offsets", "offsets_a", "offsets_b", "scales_delta")  # parts that GPTQ does not have
_NOT_FINITE = {
    "scales": "The quantisation of this layer failed: do it again (more calibration data, or a higher damp_percent).",
    "bias": "The checkpoint is damaged: download or copy it again.",
    **dict.fromkeys(MERGED, "They are not what a merge writes: merge or download the checkpoint again."),
}
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias", "offsets", "scales_delta")
_JSON_NAMES = {int: "integer", bool: "boolean", str: "string", dict: "object", list: "array"}


class Gptq:
    """A :class:`~.base.CheckpointFormat`.

    Attributes:
        reading: ``checkpoint_format``, as config or AutoGPTQ's silence says it: ``"gptq"`` or ``"gptq_v2"``.
    """

    method = "gptq"
    holds_offsets = False

    def __init__(self, quantization: dict[str, Any], where: object = "quantization_config"):
        """
        Raises:
            QALoraError: a field is of another type than it should be, or names a format that is not known, or the
                weights are for rotated activations.
        """
        for name, kind in _FIELDS.items():
            found = quantization.get(name)
            if found is not None and (not isinstance(found, kind) or (kind is int and isinstance(found, bool))):
                raise QALoraError(
                    f"{where}: {name} in quantization_config is {short(found)}, expected a JSON {_JSON_NAMES[kind]}. "
                    "The config was edited or belongs to something else: download or copy it again."
                )
        refuse_changed_activations(quantization, where, "Quantize the model without (qalora quantize MODEL OUT).")
        self.quantization = quantization
        self.reading = quantization.get("checkpoint_format") or quantization.get("format") or V1
        if self.reading not in CHECKPOINT_FORMATS:
            raise QALoraError(
                f"checkpoint_format is {short(self.reading)}, expected one of {', '.join(CHECKPOINT_FORMATS)}. "
                "Save the checkpoint again with GPTQModel in one of these formats."
            )

    @classmethod
    def detect(cls, quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == cls.method

    def specs(self, tensors: Headers, where: object) -> dict[str, GroupwiseSpec]:
        stray = next((name for name in tensors if name.rpartition(".")[2] in MERGED), None)
        if stray and not self.holds_offsets:
            raise QALoraError(
                f"{where} is a GPTQ checkpoint by its config, but holds the merged {stray}. Use the "
                "base as it was made, or the merged folder with its own config.json."
            )
        names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        if not names:
            raise QALoraError(f"{where} holds no quantised linear (no *.qweight). Is it the right folder?")
        return {name: self._spec(tensors, name, where) for name in names}

    def parts(self, spec: GroupwiseSpec) -> tuple[str, ...]:
        stored = {
            "g_idx": spec.has_g_idx,
            "bias": spec.bias_dtype,
            "offsets": spec.offset_dtype,
            "scales_delta": spec.scales_delta_dtype,
        }
        return ("qweight", "qzeros", "scales", *(part for part, there in stored.items() if there))

    def read(self, spec: GroupwiseSpec, load: "Callable[[str], Tensor]") -> GroupwiseWeight:
        import torch

        g_idx, order = None, None
        if spec.has_g_idx:
            stored = load(f"{spec.name}.g_idx").int()
            in_order = torch.arange(spec.in_features, dtype=torch.int32, device=stored.device) // spec.group_size
            if not torch.equal(stored, in_order):
                g_idx, order = stored, torch.argsort(stored, stable=True)
                if not torch.equal(stored[order], in_order):
                    raise QALoraError(_bad_g_idx(f"{spec.name}.g_idx", spec))
        scales = load(f"{spec.name}.scales")
        if spec.scales_delta_dtype:
            scales = scales.float() + load(f"{spec.name}.scales_delta")
        return GroupwiseWeight(
            qweight=load(f"{spec.name}.qweight"),
            zeros=read_zeros(load(f"{spec.name}.qzeros"), spec.bits, self.reading),
            scales=scales,
            offsets=load(f"{spec.name}.offsets") if spec.offset_dtype else None,
            g_idx=g_idx,
            group_order=order,
            bits=spec.bits,
            group_size=spec.group_size,
        )

    def write(self, name: str, weight: GroupwiseWeight, g_idx: bool = True) -> "dict[str, Tensor]":
        if weight.offsets is not None and not self.holds_offsets:
            raise Unsupported(
                f"{name} has offsets, which GPTQ's integer zero-points cannot hold.",
                "Write quant_method qalora, or export gptq8, which re-quantises.",
            )
        import torch

        columns = weight.g_idx
        if columns is None and g_idx:
            columns = torch.arange(weight.in_features, dtype=torch.int32, device=weight.qweight.device)
            columns = columns // weight.group_size
        tensors = {
            "qweight": weight.qweight,
            "qzeros": write_zeros(weight.zeros, weight.bits, self.reading),
            "scales": weight.scales,
            "g_idx": columns,
            "offsets": weight.offsets,
        }
        return {f"{name}.{part}": tensor.contiguous() for part, tensor in tensors.items() if tensor is not None}

    def check_values(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray], where: object) -> None:
        for part in set(self.parts(spec)) & set(_NOT_FINITE):
            if not all_finite(load(f"{spec.name}.{part}")):
                raise QALoraError(f"{where}: {spec.name}.{part} holds NaN or Inf. {_NOT_FINITE[part]}")
        if spec.has_g_idx:
            counts = np.bincount(load(f"{spec.name}.g_idx").clip(-1, spec.groups) + 1)
            if counts.tolist() != [0] + [spec.group_size] * spec.groups:
                raise QALoraError(_bad_g_idx(f"{where}: {spec.name}.g_idx", spec))

    def is_symmetric(self, spec: GroupwiseSpec, load: Callable[[str], np.ndarray]) -> bool:
        period = symmetric_words(spec.bits, self.reading)
        return bool((load(f"{spec.name}.qzeros").reshape(-1, len(period)) == period).all())

    def true_zeros(self, qzeros: "Tensor", bits: int) -> "Tensor":
        """Packed zero-points as this format stores them, int32 ``[G, N·b/32]`` → uint8 ``[G, N]``."""
        return read_zeros(qzeros, bits, self.reading)

    def _spec(self, tensors: Headers, name: str, where: object) -> GroupwiseSpec:
        def fail(problem: str) -> QALoraError:
            return QALoraError(f"{where}: {name}: {problem} The checkpoint is damaged or not in GPTQ layout.")

        if f"{name}.weight" in tensors:
            raise QALoraError(
                f"{where} holds {name} twice, quantized and dense ({name}.weight): nothing says which is meant. Remove "
                "one, or download the checkpoint again."
            )
        parts = {part: tensors.get(f"{name}.{part}") for part in _PARTS}
        qweight, qzeros, scales = _checked(parts, fail)
        groups, out_features = scales.shape
        ratio = qzeros.shape[1] * 32 / out_features
        if ratio not in SUPPORTED_BITS or qzeros.shape[0] != groups:
            raise fail(f"qzeros {qzeros.shape} do not fit scales {scales.shape}.")
        bits = int(ratio)
        in_features = qweight.shape[0] * 32 // bits
        if qweight.shape[1] != out_features or in_features % codes_per_period(bits):
            raise fail(f"qweight {qweight.shape} does not fit scales {scales.shape} at {bits} bits.")
        each = (groups, out_features)
        shapes = {"g_idx": (in_features,), "bias": (out_features,), "offsets": each, "scales_delta": each}
        for part, shape in shapes.items():
            found = parts[part]
            if found is not None and found.shape != shape:
                raise fail(f"{part} has shape {found.shape}, expected {shape}.")
        self._check_against_config(where, name, bits, in_features, groups)

        def float_dtype(part: str) -> str | None:
            found = parts[part]
            return None if found is None else FLOATS[found.dtype]

        return GroupwiseSpec(
            name=name,
            in_features=in_features,
            out_features=out_features,
            bits=bits,
            group_size=in_features // groups,
            scale_dtype=FLOATS[scales.dtype],
            bias_dtype=float_dtype("bias"),
            offset_dtype=float_dtype("offsets"),
            has_g_idx=parts["g_idx"] is not None,
            scales_delta_dtype=float_dtype("scales_delta"),
        )

    def _check_against_config(self, where: object, name: str, bits: int, in_features: int, groups: int) -> None:
        quantization = self.quantization
        group_size = quantization.get("group_size")
        stated = None if quantization.get("dynamic") or group_size in (None, -1) else group_size
        if in_features % groups or (stated is not None and (stated < 1 or in_features % stated)):
            raise QALoraError(
                f"{where}: {name}: group size {group_size} does not divide in_features {in_features} "
                f"({groups} groups are stored). Pooling needs whole groups: quantise the base again with a group size "
                f"that divides {in_features}."
            )
        if stated is not None and in_features != groups * stated:
            raise QALoraError(
                f"{where}: {name} is stored with group size {in_features // groups} ({groups} groups), its "
                f"quantisation config says {group_size}. One of the two is from another checkpoint."
            )
        if not quantization.get("dynamic") and quantization.get("bits") not in (None, bits):
            raise QALoraError(
                f"{where}: {name} is stored at {bits} bits, its quantisation config says "
                f"{quantization['bits']!r}. One of the two is from another checkpoint."
            )


def _checked(parts: dict[str, TensorInfo | None], fail: Callable[[str], QALoraError]) -> list[TensorInfo]:
    """``qweight``, ``qzeros`` and ``scales``, dtypes of all parts checked."""
    required = []
    for part in ("qweight", "qzeros", "scales"):
        found = parts[part]
        if found is None:
            raise fail(f"the tensor {part} is missing.")
        if len(found.shape) != 2 or 0 in found.shape:
            raise fail(f"{part} has shape {found.shape}, expected two dimensions.")
        if part != "scales" and found.dtype != "I32":
            floats = part == "qzeros" and found.dtype in FLOATS
            hint = ", not the floats of QA-LoRA's official merge.py: qalora import official SRC OUT" if floats else ""
            raise fail(f"{part} is {found.dtype}, expected int32 words{hint}.")
        required.append(found)
    for part, verb in {"scales": "are", "bias": "is", "offsets": "are", "scales_delta": "is"}.items():
        found = parts[part]
        if found is not None and found.dtype not in FLOATS:
            raise fail(f"{part} {verb} {found.dtype}, expected a float type.")
    g_idx = parts["g_idx"]
    if g_idx is not None and g_idx.dtype not in ("I32", "I64"):
        raise fail(f"g_idx is {g_idx.dtype}, expected int32.")
    return required


def _bad_g_idx(what: str, spec: GroupwiseSpec) -> str:
    return (
        f"{what} does not put exactly {spec.group_size} columns into each of {spec.groups} groups. The checkpoint is "
        "damaged: download or copy it again."
    )


def column_groups(spec: GroupwiseSpec, load: Callable[[str], np.ndarray]) -> np.ndarray:
    """The group of every column, int ``[K]``: ``g_idx``, or in order where none is stored."""
    return load(f"{spec.name}.g_idx") if spec.has_g_idx else _in_order(spec)


def is_act_order(spec: GroupwiseSpec, load: Callable[[str], np.ndarray]) -> bool:
    """True if the columns of this linear were quantised out of order (``desc_act``)."""
    return not np.array_equal(column_groups(spec, load), _in_order(spec))


def _in_order(spec: GroupwiseSpec) -> np.ndarray:
    return np.arange(spec.in_features) // spec.group_size
