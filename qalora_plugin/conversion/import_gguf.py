"""A GGUF file → a base: a folder that training, merging and serving read. No code changes, nothing is re-quantized.

Linears whose blocks hold codes become packed words (:mod:`qalora_plugin.formats.gguf.groupwise`); a file of symmetric
types alone makes a plain GPTQ folder, one with minima a folder of ours with offsets. Floats stay as they are stored.
Embeddings, and an output layer of their shape, become float16: what that costs is measured and said. One tensor at a
time is in memory, and one file of the output.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qalora_plugin.checkpoint.atomic import new_folder, require_space
from qalora_plugin.checkpoint.json_files import write_json
from qalora_plugin.checkpoint.places import require_place
from qalora_plugin.conversion.gptq_config import settings_of
from qalora_plugin.conversion.writer import write_model
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.progress import track
from qalora_plugin.formats.fusion import unservable
from qalora_plugin.formats.gguf import require_gguf
from qalora_plugin.formats.gguf.architectures import Architecture, norm_shift, of_file, row_order
from qalora_plugin.formats.gguf.blocks import decode
from qalora_plugin.formats.gguf.config import EMBEDDING, HEAD, config_of, special_tokens
from qalora_plugin.formats.gguf.groupwise import to_groupwise
from qalora_plugin.formats.gguf.placing import FLOATS, Placed, place_tensors
from qalora_plugin.formats.gguf.reading import GgufFile
from qalora_plugin.formats.gguf.tokenizer import load_tokenizer, rebuild_tokenizer
from qalora_plugin.formats.gptq import Gptq
from qalora_plugin.formats.gptq_zeros import V2
from qalora_plugin.formats.qalora import QALora

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)

_ROWS = 4096  # of a dense tensor, converted at a time
_LARGEST_HALF = 65504.0


@dataclass
class GgufImport:
    """What :func:`import_gguf` wrote.

    Attributes:
        folder: the base. method: its ``quant_method``. linears: how many are packed.
        types: llama.cpp's types in the file → number of tensors.
        losses: dense tensors that had to be rounded → the largest error, as a share of the largest value of its row.
        unservable: why vLLM cannot serve it, None if it can.
    """

    folder: Path
    method: str
    linears: int
    types: dict[str, int]
    losses: dict[str, float] = field(default_factory=dict)
    unservable: str | None = None

    def summary(self) -> list[str]:
        types = ", ".join(f"{count} × {name}" for name, count in self.types.items())
        lines = [f"{self.folder}: {self.linears} linears ({types}); not one code was changed. Train on it as a base"]
        if self.losses:
            lines.append(f"{len(self.losses)} dense tensors were rounded, by up to {max(self.losses.values()):.2g}")
        return [*lines, *([self.unservable] if self.unservable else [])]


@os_errors_in_one_line()
def import_gguf(
    src: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    model_config: str | Path | None = None,
    progress: bool = True,
) -> GgufImport:
    """Turn a GGUF file into a base that adapters can be trained on.

    Args:
        src: the file. out: the new folder; complete or absent, whatever happens.
        tokenizer: folder or Hub id of the original tokenizer; default: rebuilt from the file.
        model_config: folder or Hub id of the original config; default: made from the file's metadata.

    Raises:
        QALoraError: the file is damaged, its architecture or vocabulary not known, or another model's than tokenizer
            and config are. :class:`~qalora_plugin.formats.base.Unsupported`: a linear is of a type without groups.
    """
    source = Path(src).expanduser()
    out = require_place(out, source, "the output")
    file = GgufFile.open(source)
    architecture = of_file(file.architecture, file.path)
    config = _given_config(str(model_config), file, architecture) if model_config else config_of(file, architecture)
    placed, model_class = place_tensors(file, architecture, config)
    require_space(out.parent, sum(map(_nbytes, placed)) + (64 << 20))
    built = load_tokenizer(str(tokenizer), file) if tokenizer else rebuild_tokenizer(file)

    packed = [one.spec for one in placed if one.packed]
    offsets = any(spec.offset_dtype for spec in packed)
    types = dict(Counter(one.tensor.type for one in placed))
    result = GgufImport(out, QALora.method if offsets else Gptq.method, len(packed), types)
    result.unservable = unservable(
        {spec.name: spec for spec in packed},
        [one.module for one in placed if not one.packed and one.name[-7:] == ".weight"],
        settings := _as_json(config, model_class),
    )
    if result.unservable:
        logger.warning("%s: %s", source, result.unservable)
    quantization = _quantization_config(placed, file) | {"quant_method": result.method}
    with new_folder(out) as work:
        steps = track(placed, "importing", shown=progress)
        write_model(work, settings, quantization, _tensors(steps, file, architecture, config, result))
        built.save_pretrained(work)
        write_json(work / "generation_config.json", _generation(file))
    for name, loss in result.losses.items():
        logger.warning(
            "%s is stored in another type than in the file: it is off by up to %.2g of its row's largest value.",
            name,
            loss,
        )
    return result


def _given_config(source: str, file: GgufFile, architecture: Architecture) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    except Exception as error:  # whatever configs of any kind raise
        raise QALoraError(f"no config can be loaded from {source} ({error}).") from error
    if config.model_type not in architecture.model_types:
        raise QALoraError(
            f"the config of {source} is a {config.model_type} model's, {file.path} is {architecture.name}. Pass the "
            "config of the same model."
        )
    config.tie_word_embeddings = HEAD not in file.tensors
    if EMBEDDING in file.tensors:
        config.vocab_size = file.tensors[EMBEDDING].shape[0]
    return config


def _as_json(config: "PretrainedConfig", model_class: str) -> dict[str, Any]:
    """Gemma's activations exceed float16, which the other models are trained for or survive."""
    dtype = "bfloat16" if config.model_type.startswith("gemma") else "float16"
    content = json.loads(config.to_json_string())
    content.pop("quantization_config", None)
    return {**content, "architectures": [model_class], "dtype": dtype}


def _generation(file: GgufFile) -> dict[str, Any]:
    found: dict[str, Any] = special_tokens(file)
    ends = [found.get("eos_token_id"), file.value("tokenizer.ggml.eot_token_id", int, None)]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    return found | ({"eos_token_id": ends} if len(ends) > 1 else {})


def _quantization_config(placed: list[Placed], file: GgufFile) -> dict[str, Any]:
    """Most linears' settings, and under ``dynamic`` those of the others, as GPTQModel writes them."""
    packed = [one.spec for one in placed if one.packed]
    linears = (one for one in placed if len(one.tensor.shape) == 2 and ".layers." in one.name)
    dense = [one.module for one in linears if not one.packed]
    settings: dict[str, Any] = {
        **settings_of({spec.name: (spec.bits, spec.group_size) for spec in packed}, dense),
        "desc_act": False,
        "sym": all(spec.offset_dtype is None for spec in packed),
        "checkpoint_format": V2,
        "lm_head": False,
        "source": {"file": file.path.name, "types": dict(Counter(one.tensor.type for one in placed))},
    }
    if any(spec.offset_dtype for spec in packed):
        settings["offset_dtype"] = "float32"
    return settings


def _tensors(
    placed: Iterable[Placed], file: GgufFile, architecture: Architecture, config: "PretrainedConfig", result: GgufImport
) -> "Iterator[tuple[str, Tensor]]":
    written = {Gptq.method: Gptq, QALora.method: QALora}[result.method]({"checkpoint_format": V2})
    settings = config.to_dict()
    for one in placed:
        data = one.tensor.data
        order = row_order(architecture, settings, one.name, one.tensor.shape[0])
        if order is not None:
            data = data[np.argsort(order)]
        if one.packed:
            blocks = decode(data, one.tensor.type)
            for values in (blocks.scales, blocks.minima):
                if values is not None and not np.isfinite(values).all():
                    raise _not_finite(file, one)
            weight = to_groupwise(blocks, one.tensor.type)
            yield from written.write(one.module, weight, g_idx=result.method == Gptq.method).items()
        else:
            yield one.name, _dense(one, data, norm_shift(architecture, one.name), file, result)


def _dense(one: Placed, data: np.ndarray, shift: int, file: GgufFile, result: GgufImport) -> "Tensor":
    """Floats as stored; float32 where a shift has to be taken away; float16 for what is quantized."""
    import torch

    if one.tensor.type == "BF16":
        stored = torch.from_numpy(np.array(data)).view(torch.bfloat16).view(one.tensor.shape)
    elif one.tensor.type in FLOATS:
        stored = torch.from_numpy(np.array(data))
    else:
        stored = _dequantized(one, data, file, result)
    if shift:
        exact = stored.double() - shift
        stored = exact.float()
        _note_loss(result, one.name, exact.numpy(), stored.numpy())
    if not torch.isfinite(stored).all():
        raise _not_finite(file, one)
    return stored


def _not_finite(file: GgufFile, one: Placed) -> QALoraError:
    return QALoraError(f"{file.path}: {one.tensor.name} holds NaN or Inf. It is damaged: download or copy it again.")


def _dequantized(one: Placed, data: np.ndarray, file: GgufFile, result: GgufImport) -> "Tensor":
    import torch

    gguf = require_gguf()
    kind, dense = gguf.GGMLQuantizationType[one.tensor.type], torch.empty(one.tensor.shape, dtype=torch.float16)
    for start in range(0, len(data), _ROWS):
        with np.errstate(invalid="ignore", over="ignore"):
            exact = gguf.quants.dequantize(data[start : start + _ROWS], kind)
        if not np.abs(exact).max() <= _LARGEST_HALF:
            raise QALoraError(f"{file.path}: {one.tensor.name} holds NaN, or more than float16 can. It is damaged.")
        half = exact.astype(np.float16)
        _note_loss(result, one.name, exact, half)
        dense[start : start + _ROWS] = torch.from_numpy(half)
    return dense


def _note_loss(result: GgufImport, name: str, exact: np.ndarray, stored: np.ndarray) -> None:
    largest = np.abs(exact).max(-1)
    error = np.abs(exact - stored.astype(exact.dtype)).max(-1)
    loss = float(np.max(error / np.where(largest > 0, largest, 1)))
    if loss > result.losses.get(name, 0.0):
        result.losses[name] = loss


def _nbytes(one: Placed) -> int:
    """About what one tensor takes in the output."""
    elements = int(np.prod(one.tensor.shape))
    if not one.packed:
        return elements * (4 if one.tensor.type == "F32" else 2)
    return elements * one.spec.bits // 8 + one.spec.groups * one.spec.out_features * 9
