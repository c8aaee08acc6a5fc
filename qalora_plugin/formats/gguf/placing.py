"""Which tensor of a model each tensor of a GGUF file is, and whether it can be packed: decided before any work."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf import require_gguf
from qalora_plugin.formats.gguf.architectures import Architecture, tensor_names
from qalora_plugin.formats.gguf.blocks import BLOCK_TYPES
from qalora_plugin.formats.gguf.groupwise import container_bits
from qalora_plugin.formats.gguf.reading import GgufFile, GgufTensor
from qalora_plugin.formats.gguf.rope import TENSORS as ROPE_TENSORS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTIZE = "Use a file of another type, or quantize the original 16-bit model: qalora quantize MODEL OUT."


@dataclass(frozen=True)
class Placed:
    """Attributes:
    tensor: of the file. name: in the model folder, ``….weight`` or ``….bias``.
    packed: a linear whose codes are kept; what is quantized and not packed becomes dense.
    """

    tensor: GgufTensor
    name: str
    packed: bool

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def spec(self) -> GroupwiseSpec:
        """What a packed one becomes."""
        kind, (out_features, in_features) = BLOCK_TYPES[self.tensor.type], self.tensor.shape
        return GroupwiseSpec(
            self.module, in_features, out_features, container_bits(self.tensor.type), kind.group_size,
            scale_dtype=kind.scale_dtype, offset_dtype=None if kind.symmetric else "float32",
        )  # fmt: skip


def place_tensors(file: GgufFile, architecture: Architecture, config: "PretrainedConfig") -> tuple[list[Placed], str]:
    """Every tensor of the file and what it is in the model, in file order; and the name of the model's class.

    Raises:
        QALoraError: a tensor is missing, too many, or of another shape than the config's.
        Unsupported: a linear is of a type without codes in groups.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model class makes of a config that does not fit
        raise QALoraError(f"{file.path}: its metadata make no {config.model_type} model ({error}).") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    linears = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    stored = {gguf: name for name, gguf in tensor_names(architecture, config.num_hidden_layers, shapes).items()}
    placed = []
    for tensor in file.tensors.values():
        if tensor.name in ROPE_TENSORS:
            continue
        name = stored.pop(tensor.name, None)
        if name is None:
            raise QALoraError(
                f"{file.path} holds {tensor.name}, which {type(model).__name__} has not by its metadata. It is "
                "damaged, or of a newer kind than is known here."
            )
        if tensor.shape != shapes[name]:
            raise QALoraError(
                f"{file.path}: {tensor.name} is {tensor.shape}, by its metadata it should be {shapes[name]}. It is "
                "damaged, or the config is another model's."
            )
        placed.append(Placed(tensor, name, _is_packed(file, tensor, name in linears)))
    if missing := next(iter(stored), None):
        raise QALoraError(f"{file.path} lacks {missing} ({stored[missing]}). Download or copy the file again.")
    if unnamed := next((name for name in shapes if name not in {one.name for one in placed}), None):
        raise QALoraError(f"{file.path} has no place for {unnamed} of {type(model).__name__}.")
    if not any(one.packed for one in placed):
        raise QALoraError(
            f"{file.path} holds no quantized linear (its types: {', '.join(sorted({t.tensor.type for t in placed}))}). "
            f"{_QUANTIZE}"
        )
    return placed, type(model).__name__


def _is_packed(file: GgufFile, tensor: GgufTensor, is_linear: bool) -> bool:
    if tensor.type in FLOATS:
        return False
    if is_linear and tensor.type in BLOCK_TYPES:
        return True
    if not is_linear and getattr(require_gguf().quants, tensor.type, None) is not None and len(tensor.shape) == 2:
        return False  # the gguf package makes floats of it
    raise Unsupported(
        f"{file.path}: {tensor.name} is {tensor.type}, expected one of {', '.join((*BLOCK_TYPES, *FLOATS))}: that type "
        "has no codes in groups of one scale.",
        _QUANTIZE,
    )
