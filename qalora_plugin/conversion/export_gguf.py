"""A merged checkpoint, or a base → a GGUF file for llama.cpp and Ollama, without re-quantizing what GGUF can hold.

Every choice is made before any work: names, types, metadata, vocabulary. Then one tensor after the other is read,
encoded and written; what had to be rounded on the way is measured and said.
"""

import logging
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_plugin.checkpoint.atomic import new_file, require_space
from qalora_plugin.checkpoint.places import require_place
from qalora_plugin.conversion.model_class import idle_biases, read_config
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line, printable
from qalora_plugin.core.progress import track
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf import require_gguf
from qalora_plugin.formats.gguf.architectures import Architecture, norm_shift, of_config, row_order, tensor_names
from qalora_plugin.formats.gguf.encoding import BLOCK, DENSE_TYPES, Loss, encode, encode_dense, row_bytes, type_of
from qalora_plugin.formats.gguf.metadata import metadata
from qalora_plugin.formats.gguf.reading import GgufFile
from qalora_plugin.formats.gguf.rope import TENSORS as ROPE_TENSORS
from qalora_plugin.formats.gguf.vocabulary import vocabulary
from qalora_plugin.formats.opened import QuantizedCheckpoint

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

CHOICES = {"f16": "F16", "q8_0": "Q8_0"}
_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_RECOMPUTED = "rotary_emb.inv_freq"  # stored by old versions of transformers
_FILE_TYPES = {"Q4_0": "MOSTLY_Q4_0", "Q4_1": "MOSTLY_Q4_1", "Q8_0": "MOSTLY_Q8_0", "F16": "MOSTLY_F16"}
_NOT_COPIED = (
    "general.architecture", "general.file_type", "general.quantization_version", "general.alignment", "split.",
)  # fmt: skip


@dataclass
class GgufExport:
    """What :func:`export_gguf` wrote.

    Attributes:
        file: the GGUF file. nbytes: of it. types: llama.cpp's types → number of tensors.
        losses: of every tensor that had to be rounded, by its name in the model folder.
    """

    file: Path
    nbytes: int
    types: dict[str, int]
    losses: dict[str, Loss] = field(default_factory=dict)

    def summary(self) -> list[str]:
        types = ", ".join(f"{count} × {name}" for name, count in self.types.items())
        loss = self.total
        rounded = {
            "offsets by ≤ {:.2g} of a step": loss.largest_step,
            "scales by ≤ {:.2g}": loss.scales,
            "dense tensors by ≤ {:.2g} of their rows": loss.dense,
        }
        lost = ", ".join(text.format(value) for text, value in rounded.items() if value) or "nothing"
        return [
            f"{self.file}: {self.nbytes / 1e6:.1f} MB ({types}); rounded: {lost}",
            f"llama-cli -m {shlex.quote(printable(self.file))}",
        ]

    @property
    def total(self) -> Loss:
        """The worst of all tensors (``mean_step``: the mean)."""
        losses = list(self.losses.values())
        means = [loss.mean_step for loss in losses if loss.mean_step]
        return Loss(
            largest_step=max((loss.largest_step for loss in losses), default=0.0),
            mean_step=float(np.mean(means)) if means else 0.0,
            scales=max((loss.scales for loss in losses), default=0.0),
            dense=max((loss.dense for loss in losses), default=0.0),
        )


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the output: its names, its type, its shape in torch's order; ``module`` for a quantized linear."""

    source: str
    name: str
    type: str
    shape: tuple[int, ...]
    module: str | None = None
    symmetric: bool = False

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape[:-1])) * row_bytes(self.shape[-1], self.type)


@os_errors_in_one_line()
def export_gguf(
    merged: str | Path,
    out_file: str | Path,
    *,
    like: str | Path | None = None,
    embeddings: str = "f16",
    eight_bit: str = "f16",
    progress: bool = True,
) -> GgufExport:
    """Write a merged checkpoint or a base as GGUF.

    Args:
        merged: folder or Hub id. out_file: the new file; complete or absent, whatever happens.
        like: a GGUF file of the same model, whose metadata and vocabulary are copied; default: made from the folder.
        embeddings: ``"f16"`` or ``"q8_0"``, of embeddings and the output layer.
        eight_bit: ``"f16"`` or ``"q8_0"``, of 8-bit linears that Q8_0 does not hold exactly.

    Raises:
        Unsupported: what GGUF, or llama.cpp's idea of the architecture, cannot hold; with what to do instead.
        QALoraError: the checkpoint is damaged, or ``like`` is another model's.
    """
    for option, value in {"embeddings": embeddings, "eight_bit": eight_bit}.items():
        if value not in CHOICES:
            raise QALoraError(f"{option} is {value!r}, expected one of {', '.join(CHOICES)}.")
    gguf = require_gguf()
    out = require_place(out_file, merged, "the output")
    source = QuantizedCheckpoint.open(merged)
    source.require_own_head()
    source.check_values()
    architecture = of_config(source.files.config, source.folder)
    _refuse_act_order(source)
    config = read_config(source)
    plan = _plan(source, architecture, config, CHOICES[embeddings], CHOICES[eight_bit])
    writer = gguf.GGUFWriter(None, architecture.name)
    extra = _copy_metadata(writer, Path(like), plan) if like else _make_metadata(writer, source, config, architecture)
    types = Counter(tensor.type for tensor in plan)
    _add_file_type(writer, Counter(tensor.type for tensor in plan if tensor.module))
    require_space(out.parent, sum(tensor.nbytes for tensor in plan) + (64 << 20))

    result = GgufExport(out, 0, dict(types))
    with new_file(out) as path:
        _write(writer, path, plan, extra, source, architecture, config, result, progress)
        result.nbytes = path.stat().st_size
    _say(result)
    return result


def _refuse_act_order(source: QuantizedCheckpoint) -> None:
    if source.act_order:
        raise Unsupported(
            f"{source.folder} was quantized in act-order (desc_act): its groups lie all over the columns, those of "
            "GGUF are consecutive.",
            "Serve it with vLLM or transformers, or quantize the base again without act-order.",
        )


def _plan(
    source: QuantizedCheckpoint, architecture: Architecture, config: "PretrainedConfig", embeddings: str, eight_bit: str
) -> list[_Tensor]:
    """Every tensor to write, in the checkpoint's order."""
    sources: dict[str, str | None] = {}  # name of the weight or bias → module, if quantized
    idle = idle_biases(source)
    parts = {f"{spec.name}.{part}": spec for spec in source.specs.values() for part in source.format.parts(spec)}
    for stored in source.files.tensors:
        if stored in parts and not stored.endswith(".bias"):
            sources.setdefault(f"{parts[stored].name}.weight", parts[stored].name)
        elif stored not in idle and not stored.endswith(_RECOMPUTED):
            sources[stored] = None
    if config.tie_word_embeddings:
        sources.pop("lm_head.weight", None)
    names = tensor_names(architecture, config.num_hidden_layers, sources)
    plan = []
    for stored, module in sources.items():
        if stored not in names:
            raise Unsupported(
                f"{source.folder} holds {stored}, which has no place in llama.cpp's {architecture.name}.",
                "Serve it with vLLM or transformers.",
            )
        if module is not None:
            spec = source.specs[module]
            symmetric = source.format.is_symmetric(spec, source.files.array)
            kind, shape = type_of(spec, symmetric, eight_bit), (spec.out_features, spec.in_features)
            plan.append(_Tensor(stored, names[stored], kind, shape, module, symmetric))
            continue
        info = source.files.tensors[stored]
        kind = "F32" if len(info.shape) == 1 else DENSE_TYPES.get(info.torch_dtype, "F32")
        if stored in _EMBEDDINGS:
            kind = embeddings if info.shape[-1] % BLOCK == 0 else "F16"
        plan.append(_Tensor(stored, names[stored], kind, info.shape))
    return plan


def _make_metadata(
    writer: "GGUFWriter", source: QuantizedCheckpoint, config: "PretrainedConfig", architecture: Architecture
) -> dict[str, np.ndarray]:
    keys, tensors = metadata(config, architecture)
    named = {"general.type": "model", "general.name": source.folder.name}
    named |= {f"{architecture.name}.{key}": value for key, value in keys.items()}
    for key, value in (named | vocabulary(source.folder, config.vocab_size)).items():
        _add(writer, key, value)
    return tensors


def _add(writer: "GGUFWriter", key: str, value: Any) -> None:
    kinds = require_gguf().GGUFValueType
    scalar = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    if isinstance(value, list):
        items = {int: kinds.INT32, float: kinds.FLOAT32, str: kinds.STRING}
        writer.add_key_value(key, value, kinds.ARRAY, sub_type=items[type(value[0])])
    else:
        writer.add_key_value(key, value, scalar[type(value)])


def _copy_metadata(writer: "GGUFWriter", like: Path, plan: list[_Tensor]) -> dict[str, np.ndarray]:
    """Everything but the types; tensors of scaled positions too."""
    kinds = require_gguf().GGUFValueType
    file = GgufFile.open(like)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name not in ROPE_TENSORS}
    wanted = {tensor.name: tensor.shape for tensor in plan}
    if file.architecture != writer.arch or shapes != wanted:
        odd = next((name for name in {**wanted, **shapes} if wanted.get(name) != shapes.get(name)), "the architecture")
        raise QALoraError(
            f"{like} is another model: {odd} is {shapes.get(odd, file.architecture)} there, expected "
            f"{wanted.get(odd, writer.arch)}. Pass a GGUF of the base of this model."
        )
    for key, (value, types) in file.fields().items():
        if not key.startswith(_NOT_COPIED) and value not in ([], ""):
            writer.add_key_value(key, value, types[0], sub_type=types[-1] if types[0] == kinds.ARRAY else None)
    return {name: np.array(file.tensors[name].data) for name in ROPE_TENSORS if name in file.tensors}


def _add_file_type(writer: "GGUFWriter", types: Counter) -> None:
    """``general.file_type``: what most linears are."""
    gguf = require_gguf()
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[types.most_common(1)[0][0]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write(
    writer: "GGUFWriter",
    path: Path,
    plan: list[_Tensor],
    extra: dict[str, np.ndarray],
    source: QuantizedCheckpoint,
    architecture: Architecture,
    config: "PretrainedConfig",
    result: GgufExport,
    progress: bool,
) -> None:
    kinds = require_gguf().GGMLQuantizationType
    for name, factors in extra.items():
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    for tensor in plan:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kinds[tensor.type]
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for factors in extra.values():
        writer.write_tensor_data(factors)
    settings = config.to_dict()
    for tensor in track(plan, "exporting", shown=progress):
        order = row_order(architecture, settings, tensor.source, tensor.shape[0])
        try:
            if tensor.module is not None:
                data, loss = encode(source.weight(tensor.module), tensor.type, tensor.symmetric, order)
            else:
                shift = norm_shift(architecture, tensor.source)
                data, loss = encode_dense(source.files.tensor(tensor.source), tensor.type, shift, order)
        except OverflowError as error:
            raise Unsupported(
                f"{tensor.source} holds {error}, which exceeds the float16 of GGUF's {tensor.type}.",
                "Serve it with vLLM or transformers.",
            ) from error
        writer.write_tensor_data(data)
        if loss != Loss():
            result.losses[tensor.source] = loss
    writer.close()


def _say(result: GgufExport) -> None:
    total = result.total
    logger.info("wrote %s (%.1f MB): %s", result.file, result.nbytes / 1e6, result.types)
    if total.scales:
        logger.warning(
            "scales are rounded to float16, which GGUF's Q4_1 has: by up to %.2g of them; weights are off by up to "
            "%.2g of a quantization step",
            total.scales, total.largest_step,
        )  # fmt: skip
    if total.dense:
        logger.warning("dense weights are rounded: by up to %.2g of the largest value of a row", total.dense)
