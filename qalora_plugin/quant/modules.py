"""Which linears of a checkpoint are quantised, and how: read off the tensors themselves, then held against the config.

The shapes say everything (bits, group size, sizes), so ``dynamic``, ``modules_to_not_convert`` and a dense ``lm_head``
need no rules of their own: what has a ``qweight`` is quantised.
"""

from dataclasses import dataclass

import numpy as np

from ..errors import QALoraError
from .checkpoint import Checkpoint, short
from .words import SUPPORTED_BITS, codes_per_period, symmetric_words

BASE_METHOD = "gptq"
MERGED_METHOD = "qalora"
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
FORMAT_VERSION = 1
# In a merged checkpoint's config.json: transformers loads the file that this key names, so that without this package it
# stops at a file that is not there, instead of initialising at random what it cannot read.
WEIGHTS_KEY = "transformers_weights"
NEEDS_QALORA = "this-model-needs-the-qalora-package-installed.safetensors"
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_FIELDS = {  # of quantization_config; None stands for "not given"
    "bits": int, "group_size": int, "desc_act": bool, "sym": bool, "lm_head": bool, "dynamic": dict,
    "quant_method": str, "checkpoint_format": str, "format": str, "offset_dtype": str, "serving_path": str,
    "modules_to_not_convert": list, "modules_in_block_to_quantize": list,
}  # fmt: skip
_NOT_FINITE = {
    "scales": "The quantisation of this layer failed: do it again (more calibration data, or a higher damp_percent).",
    "bias": "The checkpoint is damaged: download or copy it again.",
    "offsets": "They are not what a merge writes: merge or download the checkpoint again.",
}
_JSON_NAMES = {int: "integer", bool: "boolean", str: "string", dict: "object", list: "array"}


@dataclass(frozen=True)
class QuantizedModule:
    """Shape and storage of one quantised linear, in this project's letters; dtypes by torch's names for them."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    scale_dtype: str
    bias_dtype: str | None
    offset_dtype: str | None
    has_g_idx: bool

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size


def check_fields(quantization: dict, where: object = "quantization_config") -> None:
    """Refuse a field of ``quantization_config`` that is of another type than it should be."""
    for name, kind in _FIELDS.items():
        found = quantization.get(name)
        if found is not None and (not isinstance(found, kind) or (kind is int and isinstance(found, bool))):
            raise QALoraError(
                f"{where}: {name} in quantization_config is {short(found)}, expected a JSON {_JSON_NAMES[kind]}. "
                "The config was edited or belongs to something else: download or copy it again."
            )


def checkpoint_format(quantization: dict) -> str:
    """``"gptq"`` (zeros stored minus one) or ``"gptq_v2"``; AutoGPTQ's configs, which name none, are v1."""
    found = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    if found not in CHECKPOINT_FORMATS:
        raise QALoraError(
            f"checkpoint_format is {short(found)}, expected one of {', '.join(CHECKPOINT_FORMATS)}. "
            "Save the checkpoint again with GPTQModel in one of these formats."
        )
    return found


def require_base(checkpoint: Checkpoint) -> dict[str, QuantizedModule]:
    """Quantised linears of a GPTQ base.

    Raises:
        QALoraError: not a GPTQ checkpoint, or one that breaks a rule of the format.
    """
    method = checkpoint.method
    if method != BASE_METHOD:
        raise QALoraError(f"{checkpoint.folder} cannot be a base: {_why_not_base(checkpoint)}")
    return quantized_modules(checkpoint)


def _why_not_base(checkpoint: Checkpoint) -> str:
    method = checkpoint.method
    make_one = "Make a GPTQ checkpoint of the original 16-bit model: qalora quantize MODEL OUT."
    if method is None and checkpoint.quantization:
        return f"its quantization_config names no quant_method, expected 'gptq'. {make_one}"
    if method is None:
        return f"it is dense (config.json has no quantization_config). {make_one}"
    if method == MERGED_METHOD:
        return (
            "it is already a merged QA-LoRA checkpoint. Train on the GPTQ base it was merged from"
            f" ({checkpoint.quantization.get('base_model', 'see its README.md')}); to go on training an adapter, "
            "set lora_model_dir."
        )
    return f"its quant_method is {method!r}, expected 'gptq'. {make_one}"


def quantized_modules(checkpoint: Checkpoint) -> dict[str, QuantizedModule]:
    """Every quantised linear by name, in checkpoint order, shapes and values checked.

    Raises:
        QALoraError: no quantised linear, tensors missing, of the wrong shape or at odds with the config, bad scales.
    """
    check_fields(checkpoint.quantization, checkpoint.folder)
    version = checkpoint.quantization.get("format_version")
    if checkpoint.method == MERGED_METHOD and (version != FORMAT_VERSION or isinstance(version, bool)):
        raise QALoraError(
            f"{checkpoint.folder}: format_version is {short(version)}, this version of qalora reads {FORMAT_VERSION}. "
            "Update qalora, or merge again."
        )
    checkpoint_format(checkpoint.quantization)
    stray = next((name for name in checkpoint.tensors if name.endswith(".offsets")), None)
    if checkpoint.method == BASE_METHOD and stray:
        raise QALoraError(
            f"{checkpoint.folder} is a GPTQ checkpoint by its config, but holds the merged offsets {stray}. Use the "
            "base as it was made, or the merged folder with its own config.json."
        )
    names = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
    if not names:
        raise QALoraError(f"{checkpoint.folder} holds no quantised linear (no *.qweight). Is it the right folder?")
    return {name: _module(checkpoint, name) for name in names}


def _module(checkpoint: Checkpoint, name: str) -> QuantizedModule:
    def fail(problem: str) -> QALoraError:
        return QALoraError(f"{checkpoint.folder}: {name}: {problem} The checkpoint is damaged or not in GPTQ layout.")

    parts = {
        part: checkpoint.tensors.get(f"{name}.{part}")
        for part in ("qweight", "qzeros", "scales", "g_idx", "bias", "offsets")
    }
    for part in ("qweight", "qzeros", "scales"):
        if parts[part] is None:
            raise fail(f"the tensor {part} is missing.")
        if len(parts[part].shape) != 2 or 0 in parts[part].shape:
            raise fail(f"{part} has shape {parts[part].shape}, expected two dimensions.")
    for part in ("qweight", "qzeros"):
        if parts[part].dtype != "I32":
            raise fail(f"{part} is {parts[part].dtype}, expected int32 words.")
    for part, verb in {"scales": "are", "bias": "is", "offsets": "are"}.items():
        if parts[part] is not None and parts[part].dtype not in _FLOATS:
            raise fail(f"{part} {verb} {parts[part].dtype}, expected a float type.")
    if parts["g_idx"] is not None and parts["g_idx"].dtype not in ("I32", "I64"):
        raise fail(f"g_idx is {parts['g_idx'].dtype}, expected int32.")
    groups, out_features = parts["scales"].shape
    bits = parts["qzeros"].shape[1] * 32 / out_features
    if bits not in SUPPORTED_BITS or parts["qzeros"].shape[0] != groups:
        raise fail(f"qzeros {parts['qzeros'].shape} do not fit scales {parts['scales'].shape}.")
    bits = int(bits)
    in_features = parts["qweight"].shape[0] * 32 // bits
    if parts["qweight"].shape[1] != out_features or in_features % codes_per_period(bits):
        raise fail(f"qweight {parts['qweight'].shape} does not fit scales {parts['scales'].shape} at {bits} bits.")
    for part, shape in {"g_idx": (in_features,), "bias": (out_features,), "offsets": (groups, out_features)}.items():
        if parts[part] is not None and parts[part].shape != shape:
            raise fail(f"{part} has shape {parts[part].shape}, expected {shape}.")
    _check_against_config(checkpoint, name, bits, in_features, groups)

    def float_dtype(part: str) -> str | None:
        return None if parts[part] is None else _FLOATS[parts[part].dtype]

    return QuantizedModule(
        name=name,
        in_features=in_features,
        out_features=out_features,
        bits=bits,
        group_size=in_features // groups,
        scale_dtype=float_dtype("scales"),
        bias_dtype=float_dtype("bias"),
        offset_dtype=float_dtype("offsets"),
        has_g_idx=parts["g_idx"] is not None,
    )


def _check_against_config(checkpoint: Checkpoint, name: str, bits: int, in_features: int, groups: int) -> None:
    quantization = checkpoint.quantization
    group_size = quantization.get("group_size")
    stated = not quantization.get("dynamic") and group_size not in (None, -1)
    if in_features % groups or (stated and in_features % group_size):
        raise QALoraError(
            f"{checkpoint.folder}: {name}: group size {group_size} does not divide in_features {in_features} "
            f"({groups} groups are stored). Pooling needs whole groups: quantise the base again with a group size that "
            f"divides {in_features}."
        )
    if stated and in_features != groups * group_size:
        raise QALoraError(
            f"{checkpoint.folder}: {name} is stored with group size {in_features // groups} ({groups} groups), its "
            f"quantisation config says {group_size}. One of the two is from another checkpoint."
        )
    if not quantization.get("dynamic") and quantization.get("bits") not in (None, bits):
        raise QALoraError(
            f"{checkpoint.folder}: {name} is stored at {bits} bits, its quantisation config says "
            f"{quantization['bits']!r}. One of the two is from another checkpoint."
        )


def check_values(checkpoint: Checkpoint, modules: dict[str, QuantizedModule]) -> None:
    """Refuse NaN or Inf in scales, biases and offsets, and an act-order index that is none. Reads 1/g of the whole."""
    for name, module in modules.items():
        for part, stored in {"scales": True, "bias": module.bias_dtype, "offsets": module.offset_dtype}.items():
            if stored and not all_finite(checkpoint.array(f"{name}.{part}")):
                raise QALoraError(f"{checkpoint.folder}: {name}.{part} holds NaN or Inf. {_NOT_FINITE[part]}")
        if module.has_g_idx:
            counts = np.bincount(checkpoint.array(f"{name}.g_idx").clip(-1, module.groups) + 1)
            if counts.tolist() != [0] + [module.group_size] * module.groups:
                raise QALoraError(
                    f"{checkpoint.folder}: {name}.g_idx does not put exactly {module.group_size} columns into each of "
                    f"{module.groups} groups. The checkpoint is damaged."
                )


def all_finite(array: np.ndarray) -> bool:
    """No NaN, no Inf: no exponent of ones. (``isfinite`` takes float16 element by element, 15 times as long.)"""
    exponent = np.array(np.inf, dtype=array.dtype).view(f"u{array.itemsize}")
    return not ((array.view(exponent.dtype) & exponent) == exponent).any()


def column_groups(checkpoint: Checkpoint, module: QuantizedModule) -> np.ndarray:
    """The group of every column, int ``[K]``: ``g_idx``, or in order where none is stored."""
    return checkpoint.array(f"{module.name}.g_idx") if module.has_g_idx else _in_order(module)


def _in_order(module: QuantizedModule) -> np.ndarray:
    return np.arange(module.in_features) // module.group_size


def is_act_order(checkpoint: Checkpoint, module: QuantizedModule) -> bool:
    """True if the columns of this linear were quantised out of order (``desc_act``)."""
    return not np.array_equal(column_groups(checkpoint, module), _in_order(module))


def is_symmetric(checkpoint: Checkpoint, module: QuantizedModule) -> bool:
    """True if every zero-point is 2^(b−1): read off the zeros, since configs are known to be wrong about it."""
    period = symmetric_words(module.bits, checkpoint_format(checkpoint.quantization))
    return bool((checkpoint.array(f"{module.name}.qzeros").reshape(-1, len(period)) == period).all())
