"""``init: calibrated``: what a new adapter starts from, by the 16-bit model and calibration text.

The arithmetic is in :mod:`.calibration`, the inputs of linears come from :mod:`.block_inputs`.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor, nn

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.eval.limits import fitting_length, model_config, positions, vocabulary
from qalora_plugin.eval.tokens import load_tokenizer, require_ids
from qalora_plugin.integrations.peft.adapter import QALoraLayer
from qalora_plugin.integrations.peft.experts import QALoraExpertsLayer
from qalora_plugin.integrations.transformers.dense_models import load_dense
from qalora_plugin.integrations.transformers.launched import is_one_of_several, is_to_be_sharded
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.methods.block_inputs import Moments, blocks_of, moments
from qalora_plugin.methods.calibration import calibrated_factors, made_up
from qalora_plugin.methods.calibration_text import read_calibration
from qalora_plugin.methods.dense_source import dense_folder
from qalora_plugin.methods.same_model import dense_weight, require_near, require_same_norms, require_same_sizes

logger = logging.getLogger(__name__)

CALIBRATED = "calibrated"  # `qalora.init` in an adapter's config
SAMPLES, LENGTH = 128, 512


class Errors(NamedTuple):
    """Of one linear's outputs on calibration text, ``Σ_n ‖w − w'‖²`` in the norm of ``XᵀX/T``.

    Attributes:
        before: of the base. after: with the adapter.
    """

    before: float
    after: float


def calibrate(
    model: Any,
    dense: str | Path,
    text: str | Path | Sequence[list[int]],
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
    revision: str | None = None,
    progress: bool = True,
) -> dict[str, Errors]:
    """Give a new adapter the values with which base + adapter is closest to the 16-bit model, instead of zero.

    Linears outside the decoder's blocks (lm_head), and those that no token comes to, keep their start. Every process of
    a distributed run computes the same, and then takes what the first one has.

    Args:
        model: from :func:`~qalora_plugin.add_adapter`; its active adapter, with or without scales, is set in place.
        dense: folder or Hub id of the 16-bit model that the base was quantized from.
        text: a local ``.txt``/``.jsonl`` file, or a dataset id of the Hub; or sequences of token ids.
        samples, length, seed: how many sequences of how many tokens of a text to take, and which.
        revision: of ``dense`` on the Hub.

    Returns:
        Errors of each linear that was calibrated, by its name in the model.

    Raises:
        QALoraError: not a new adapter, not its base's 16-bit model, or one that this cannot be done for.
    """
    layers = _adapted(model)
    if isinstance(text, str | Path):
        read = read_calibration(str(text), samples, length, seed)
        folder = dense_folder(dense, revision)
        sequences = read.sequences(load_tokenizer(folder), fitting_length(model_config(folder), length))
    else:
        sequences = _as_sequences(text)
        folder = dense_folder(dense, revision)
    base = model.get_base_model()
    twin = load_dense(folder, str(dense), model_class=type(base).__name__, dtype="auto").eval()
    weights = {name: _weight(layer) for name, layer in layers.items()}
    require_same_sizes(twin, weights, dense)
    longest = positions(twin.config)
    if longest and any(len(sequence) > longest for sequence in sequences):
        raise QALoraError(f"a sequence has more tokens than the {longest} that {dense} takes. Pass shorter ones.")
    require_ids(sequences, vocabulary(twin.config), dense)
    blocks, inside = blocks_of(twin, [name for name, layer in layers.items() if layer.scaling[_active(layer)]])
    require_near(twin, {name: weights[name] for name in inside}, dense)
    require_same_norms(twin, base, dense)
    errors = {}
    with Progress(disable=not progress, transient=True) as bar, _evaluating(base), _all_or_none(layers.values()):
        for names, found in moments(twin, base, blocks, inside, sequences, bar):
            for name in names:
                errors[name] = _set(name, layers[name], dense_weight(twin.get_submodule(name)), found)
        _take_the_first_ranks(layers.values())
    if untouched := sorted(set(layers) - set(errors)):
        logger.warning(
            "%d linears keep an adapter that starts at zero, because no calibration text comes to them, or their alpha "
            "is 0: %s …",
            len(untouched), untouched[0],
        )  # fmt: skip
    model.peft_config[model.active_adapter].qalora["init"] = CALIBRATED
    before, after = sum(found.before for found in errors.values()), sum(found.after for found in errors.values())
    logger.info(
        "adapter calibrated on %d tokens: the mean square error of %d linears' outputs is %.3f of the base's",
        sum(map(len, sequences)), len(errors), after / before if before else 1.0,
    )  # fmt: skip
    return errors


def _adapted(model: Any) -> dict[str, QALoraLayer]:
    """The layers of the active adapter, by their names in the base model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = {name: module for name, module in base.named_modules() if isinstance(module, QALoraLayer)}
    layers = {name: layer for name, layer in found.items() if _active(layer) in layer.lora_A}
    if not layers:
        raise QALoraError("this model has no QA-LoRA adapter. Add one first: add_adapter(load_base(base), …).")
    if is_to_be_sharded():
        raise QALoraError(
            "init: calibrated needs whole layers, and FSDP and DeepSpeed share them out over ranks. Calibrate in one "
            "process first (qalora_plugin.calibrate, then save_pretrained), and train that adapter (lora_model_dir)."
        )
    for name, layer in layers.items():
        if isinstance(layer, QALoraExpertsLayer):
            raise QALoraError(
                f"init: calibrated is for linears, but {name} holds a mixture of experts. Leave init out, or exclude "
                "the experts (lora_exclude_modules)."
            )
        if layer.lora_B[_active(layer)].weight.any():
            raise QALoraError(
                f"the adapter on {name} is not new: its B is not zero. Calibrate an adapter before it is trained."
            )
    return layers


def _active(layer: QALoraLayer) -> str:
    if layer.disable_adapters:
        raise QALoraError("the adapter is disabled. Calibrate it outside of disable_adapter().")
    if len(layer.active_adapters) != 1:
        raise QALoraError(
            f"{len(layer.active_adapters)} adapters are active, expected one. Choose it with set_adapter(name)."
        )
    return layer.active_adapters[0]


def _weight(layer: QALoraLayer) -> GroupwiseWeight:
    return cast(QuantLinear, layer.get_base_layer()).quantized


def _as_sequences(given: Any) -> list[list[int]]:
    """Sequences of token ids, as lists of them.

    Raises:
        QALoraError: none, an empty one, or something else.
    """
    if not isinstance(given, Iterable):
        raise QALoraError(f"text to calibrate on is {short(given)}, expected a file, a dataset's id or sequences.")
    sequences = [one.tolist() if isinstance(one, Tensor) else one for one in given]
    for sequence in sequences:
        if not isinstance(sequence, list | tuple) or not all(type(token) is int for token in sequence):
            raise QALoraError(
                f"a sequence to calibrate on is {short(sequence)}, expected a list of token ids. Tokenize texts first, "
                "or pass a text file."
            )
    if not sequences or not all(sequences):
        raise QALoraError("no sequence to calibrate on was given, or an empty one. Pass some, or a text file.")
    return [list(sequence) for sequence in sequences]


@torch.no_grad()
def _set(linear: str, layer: QALoraLayer, dense: Tensor, inputs: Moments) -> Errors:
    name = _active(layer)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    has_scales = name in layer.lora_D
    dense = dense.to(inputs.hessian.device)
    if not all(part.isfinite().all() for part in (dense, inputs.hessian, inputs.drift)):
        raise QALoraError(
            f"the 16-bit model holds NaN or Inf, or computes it on this text: in {linear}, or before it. Download or "
            "copy it again."
        )
    wanted = made_up(dense, *inputs)
    found = calibrated_factors(_weight(layer), wanted, inputs.hessian, a.shape[0], layer.scaling[name], has_scales)
    ratios = layer.ratios[name]  # what is held is each factor divided by its own
    a.copy_(found.a / ratios.offsets)
    b.copy_(found.b / ratios.offsets)
    if found.d is not None and found.c is not None:
        layer.lora_D[name].weight.copy_(found.d / ratios.scales)
        layer.lora_C[name].weight.copy_(found.c / ratios.scales)
    return Errors(found.before, found.after)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _all_or_none(layers: Collection[QALoraLayer]) -> Iterator[None]:
    """What stops half-way leaves a new adapter, which can be calibrated again."""
    before = [(weight, weight.clone()) for layer in layers for weight in _factors(layer)]
    try:
        yield
    except BaseException:  # Ctrl-C, too
        with torch.no_grad():
            for weight, value in before:
                weight.copy_(value)
        raise


def _factors(layer: QALoraLayer) -> list[Tensor]:
    name = _active(layer)
    held = (layer.lora_A, layer.lora_B, layer.lora_D, layer.lora_C)
    return [factors[name].weight.detach() for factors in held if name in factors]


def _take_the_first_ranks(layers: Iterable[QALoraLayer]) -> None:
    """What is random in A and D, and rounding, may differ between ranks. As objects: NCCL has none on a CPU."""
    if not is_one_of_several():
        return
    for layer in layers:
        weights = _factors(layer)
        values = [[weight.cpu() for weight in weights]]
        dist.broadcast_object_list(values, src=0)
        for weight, value in zip(weights, values[0], strict=True):
            weight.copy_(value)
