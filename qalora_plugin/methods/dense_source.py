"""A 16-bit model before it is quantized: whether all of it is there, and whether its linears can be cut into groups."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qalora_plugin.checkpoint.folder import read_config
from qalora_plugin.checkpoint.hub import fetch_config, is_hub_id, resolve
from qalora_plugin.checkpoint.json_files import read_json
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.words import codes_per_period

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Those that GPTQModel packs, beside -1: SUPPORTS_GROUP_SIZE of gptqmodel/nn_modules/qlinear/torch.py (7.6).
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)

Linear = nn.Linear | Conv1D


def as_matrix(linear: Linear) -> Tensor:
    """Its weight as ``[N, K]``; GPT-2's ``Conv1D`` holds the transpose."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def sizes_in_layers(
    model: "PreTrainedModel", stacks: Collection[str], leaves: Collection[str]
) -> dict[str, tuple[int, int]]:
    """``(N, K)`` of every linear in the layers of a model, by name; of experts that transformers stacks, which are
    quantized one by one, of each projection.

    Args:
        stacks: lists of layers (``model.layers``). leaves: linears in each layer (``mlp.up_proj``,
            ``mlp.experts.0.up_proj``); others are left dense.
    """
    in_layer = re.compile(rf"(?:{'|'.join(map(re.escape, stacks))})\.\d+\.(?P<leaf>.+)")
    experts = {leaf.partition(".experts.")[0] + ".experts" for leaf in leaves if ".experts." in leaf}
    found = {}
    for name, part in model.named_modules():
        match = in_layer.fullmatch(name) if stacks else None
        if match and match["leaf"] in leaves and isinstance(part, Linear):
            n, k = as_matrix(part).shape
            found[name] = n, k
        elif match and match["leaf"] in experts and isinstance(down := getattr(part, "down_proj", None), nn.Parameter):
            _, *ends = down.shape
            hidden, inner = reversed(ends) if getattr(part, "is_transposed", False) else ends
            found[f"{name}.down_proj"] = hidden, inner
            found[f"{name}.up_proj"] = inner, hidden
    return found


def dense_folder(model: str | Path, revision: str | None = None, what: str = "the model") -> Path:
    """Where a 16-bit model is; one on the Hub is downloaded, once its config says that it is one.

    Args:
        model: folder or Hub id. what: the setting that names it, for the error.

    Raises:
        QALoraError: there is none, or it is quantized itself.
    """
    if is_hub_id(model):
        require_dense(read_json(fetch_config(str(model), revision, what)), model)
    folder = resolve(model, revision)
    require_dense(read_config(folder), model)
    return folder


def require_dense(config: dict[str, Any], model: str | Path) -> None:
    """Refuse a model that is quantized itself."""
    if found := config.get("quantization_config"):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise QALoraError(f"{model} is quantized itself ({method}). Give the original 16-bit model.")


def require_group_size(group_size: int) -> None:
    """
    Raises:
        QALoraError: GPTQModel packs no such groups.
    """
    if group_size != -1 and group_size not in GROUP_SIZES:
        raise QALoraError(f"group size {group_size} is none that GPTQModel packs. {_advice(GROUP_SIZES)}")


def _advice(fitting: Collection[int]) -> str:
    return f"Use {f'one of {list(fitting)}, or ' if fitting else ''}-1 for one group a column."


def require_sizes(sizes: dict[str, tuple[int, int]], bits: int, group_size: int) -> None:
    """
    Args:
        sizes: ``(N, K)`` by name. group_size: -1 for one group a column.

    Raises:
        QALoraError: GPTQModel packs no such groups, or a linear cannot be cut into whole groups and whole words.
    """
    fitting = [size for size in GROUP_SIZES if all(k % size == 0 for _, k in sizes.values())]
    period = codes_per_period(bits)
    for name, (n, k) in sizes.items():
        if group_size != -1 and k % group_size:
            raise QALoraError(
                f"group size {group_size} does not divide the {k} inputs of {name}: pooling needs whole groups. "
                f"{_advice(fitting)}"
            )
        if k % period or n % period:
            raise QALoraError(
                f"{name} has {k} inputs and {n} outputs, and codes of {bits} bits fill whole words {period} at a time. "
                "Use other bits."
            )
