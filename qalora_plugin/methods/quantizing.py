"""`qalora quantize`: a 16-bit model → a GPTQ base. GPTQModel does the work; this picks data and checks the request."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import chdir, contextmanager
from importlib.util import find_spec
from math import inf, prod
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING

import torch

from qalora_plugin.checkpoint.atomic import new_folder, require_absent, require_space
from qalora_plugin.checkpoint.companions import GENERATION_CONFIG, copy_companions
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.places import absolute, require_place
from qalora_plugin.checkpoint.termination import Termination
from qalora_plugin.conversion.gptq_config import settings_of
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.progress import track
from qalora_plugin.core.words import SUPPORTED_BITS
from qalora_plugin.eval.limits import fitting_length, vocabulary
from qalora_plugin.eval.tokens import load_tokenizer, require_ids
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.integrations.transformers.dense_models import empty_model
from qalora_plugin.integrations.transformers.loading import load_model
from qalora_plugin.kernels.hardware import gemm_dtype
from qalora_plugin.methods.bit_allocation import (
    GROUP_SIZES,
    Choice,
    allocate,
    bits_a_weight,
    choices_of,
    require_possible,
)
from qalora_plugin.methods.calibration_text import read_calibration
from qalora_plugin.methods.dense_source import (
    Linear,
    dense_folder,
    require_group_size,
    require_sizes,
    sizes_in_layers,
)
from qalora_plugin.methods.sensitivity import measure, sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_MSE_POWER = 2.4  # of the error that clipping minimizes, as GPTQ's authors have it
_MEASURED = 32  # sequences that sensitivities are measured on


@os_errors_in_one_line()
def quantize(
    model: str,
    out: str | Path,
    dataset: str,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool = False,
    act_order: bool = False,
    samples: int = 256,
    length: int = 512,
    seed: int = 0,
    checkpoint_format: str | None = None,
    revision: str | None = None,
    budget: float | None = None,
    clip: bool | None = None,
    fisher: bool | None = None,
    gptaq: bool | None = None,
) -> Path:
    """Quantise a dense model with GPTQ.

    Args:
        model: folder or Hub id of the 16-bit model.
        out: the new folder; complete or absent.
        dataset: calibration text: a local ``.txt``/``.jsonl`` file, or a dataset id of the Hub.
        bits, group_size: default 4 and 32. ``budget`` chooses bits, and where no group size is given that, too.
        samples, length: how many sequences of how many tokens to calibrate on; of shorter ones, as many as make as many
            tokens.
        checkpoint_format: default ``gptq`` for symmetric, ``gptq_v2`` for asymmetric bases, whose zeros v1 stores
            in a way that some readers get wrong.
        budget: bits a weight when it is served, scales, zero-points and an adapter's offsets included: each layer gets
            bits, and a group size, of its own (:mod:`.bit_allocation`).
        fisher: weight what a layer loses by Fisher information (:mod:`.sensitivity`), for ``budget``; default: yes.
            Without, bits go where outputs are large, and the model may be worse than with the same bits everywhere.
        clip: shrink each group's grid where that lowers the error (GPTQModel's ``mse``); default: at 2 and 3 bits.
        gptaq: fit each linear to what it gives in the 16-bit model, not to what it would give behind layers that are
            quantised already (GPTAQ, arXiv 2504.02692; GPTQModel's ``gptaq``); default: unless there are experts.

    Raises:
        QALoraError: GPTQModel is not installed, or the request cannot work.
    """
    require_absent(out := absolute(out))
    if budget is not None and bits is not None:
        raise QALoraError("a budget chooses bits itself. Leave bits out, or the budget.")
    if budget is not None and not 0 < budget < inf:
        raise QALoraError(f"budget is {budget}, expected bits a weight, as 4.25.")
    if budget is not None and group_size not in (None, *GROUP_SIZES):
        raise QALoraError(
            f"group_size is {group_size}, expected one of {GROUP_SIZES} beside a budget. Leave it out, and each layer "
            "gets one of its own."
        )
    group_sizes = GROUP_SIZES if group_size is None else (group_size,)
    bits, group_size = 4 if bits is None else bits, 32 if group_size is None else group_size
    if bits not in SUPPORTED_BITS:
        raise QALoraError(f"bits is {bits}, expected one of {SUPPORTED_BITS}.")
    if not -(2**63) <= seed < 2**64:
        raise QALoraError(f"seed is {seed}, expected a number of 64 bits.")
    if budget is None and fisher is not None:
        raise QALoraError("fisher weights the choices that a budget leaves. Give a budget, or leave fisher out.")
    if find_spec("gptqmodel") is None:
        raise QALoraError(
            "GPTQModel is not installed here. It cannot share an environment with axolotl 0.19; make one for "
            "quantising and serving: python -m venv .venv-serve && .venv-serve/bin/pip install torch setuptools wheel "
            "ninja && .venv-serve/bin/pip install --no-build-isolation gptqmodel==7.6.0 && "
            ".venv-serve/bin/pip install '.[quantize]'"
        )
    if budget is not None and find_spec("scipy") is None:
        raise QALoraError("a budget takes scipy, which is not installed here. Install it: pip install scipy")
    require_group_size(group_size)
    require_place(out, model, "the output")
    text = read_calibration(dataset, samples, length, seed)
    folder = dense_folder(model, revision)
    files, empty = Checkpoint.open(folder), empty_model(folder)
    to_be_quantized = _sizes(folder, empty)
    if budget is None:
        require_sizes(to_be_quantized, bits, group_size)
    has_experts = any(".experts." in name for name, _ in empty.named_parameters())
    if gptaq and has_experts:
        raise QALoraError(
            "gptaq compares each linear's inputs in the 16-bit and the quantised model token by token, and behind "
            f"quantised layers {model}'s router sends tokens to other experts. Leave it out."
        )
    gptaq = not has_experts if gptaq is None else gptaq

    from gptqmodel import GPTAQConfig, GPTQModel, QuantizeConfig

    tokenizer = load_tokenizer(folder)
    sequences = text.sequences(tokenizer, fitting_length(empty.config, length))
    require_ids(sequences, vocabulary(empty.config), model)
    needed = _bytes_made(files, to_be_quantized, bits, group_size, budget)
    for place in (out.parent, Path(gettempdir())):  # where GPTQModel leaves what it is done with
        require_space(place, needed)
    files.require_finite(track(files.tensors, "reading"))
    plan = {}
    if budget is not None:
        plan = plan_for(folder, sequences, budget, fisher is not False, to_be_quantized, act_order, group_sizes)
    fewest = min((choice.bits for choice in plan.values()), default=bits)
    torch.manual_seed(seed)
    # GPTQModel leaves logs where it runs, and what it is done with: gone with our folder, after SIGTERM, too.
    with (
        Termination() as termination,
        TemporaryDirectory() as scratch,
        chdir(scratch),
        _enough_workers(),
        termination.interrupts(),
    ):
        quantize_config = QuantizeConfig(
            **(settings_of(plan) if plan else {"bits": bits, "group_size": group_size}),
            gptaq=GPTAQConfig(device="cpu") if gptaq else None,
            auto_forward_data_parallel=not gptaq,  # 7.6 pairs the inputs of both models by the order they come in
            mse=_MSE_POWER if (fewest <= 3 if clip is None else clip) else 0.0,
            sym=sym,
            desc_act=act_order,
            act_group_aware=not act_order and group_size != -1,  # an order of groups, of which -1 has one
            offload_to_disk_path=str(Path(scratch) / "done"),
            format=checkpoint_format or ("gptq" if sym else "gptq_v2"),
        )
        quantized = GPTQModel.load(str(folder), quantize_config)
        _tell_what_is_rounded(empty.config.dtype, quantized.model.dtype)
        rows = [{"input_ids": sequence, "attention_mask": [1] * len(sequence)} for sequence in sequences]
        quantized.quantize(rows, tokenizer=tokenizer, calibration_data_min_length=1)  # it leaves out short ones else
        with new_folder(out) as work, TemporaryDirectory() as own:
            quantized.save(str(work))
            (work / GENERATION_CONFIG).unlink(missing_ok=True)  # GPTQModel's own, which samples
            tokenizer.save_pretrained(own)
            copy_companions(folder, Path(own), work)
            QuantizedCheckpoint.open(work).check_values()
    return out


def plan_for(
    folder: Path,
    sequences: list[list[int]],
    budget: float,
    fisher: bool,
    to_be_quantized: Collection[str] = (),
    act_order: bool = False,
    group_sizes: Collection[int] = GROUP_SIZES,
) -> dict[str, Choice]:
    """Bits and group size of every linear of a 16-bit model, within ``budget`` bits a weight, all included.

    Args:
        fisher: weight by it. to_be_quantized: those that count, where that is known; else all but the head.
        act_order: of the base. group_sizes: to choose from.
    """
    model = load_model(folder, dtype=gemm_dtype(torch.bfloat16, torch.device("cpu"))).eval()
    stacked = (name for name, part in model.named_parameters() if ".experts." in name and part.dim() > 2)
    if experts := next(stacked, None):
        raise QALoraError(
            f"a budget is for models of linears, and {experts} holds a mixture of experts, which it would not count. "
            "Give bits and group_size instead."
        )
    head = model.get_output_embeddings()
    linears = {name: part for name, part in model.named_modules() if isinstance(part, Linear) and part is not head}
    if to_be_quantized:
        linears = {name: part for name, part in linears.items() if name in to_be_quantized}
    if not linears:
        raise QALoraError(f"a {type(model).__name__} holds no linears to spend a budget on. Give bits instead.")
    choices = choices_of(group_sizes)
    require_possible(sizes(linears, act_order, choices), budget)
    layers = measure(model, linears, sequences[:_MEASURED], fisher, act_order, choices)
    chosen = allocate(layers, budget)
    counts = Counter(chosen.values())
    kinds = ", ".join(f"{counts[choice]} × {choice.bits} bit g {choice.group_size}" for choice in sorted(counts))
    logger.info("%.2f bits a weight, all included: %s", bits_a_weight(layers, chosen), kinds)
    return chosen


@contextmanager
def _enough_workers() -> Iterator[None]:
    """GPTQModel 7.6 gives a machine of fewer than four cores one worker, and then asks itself for two."""
    name = "GPTQMODEL_CPU_WORKERS"
    if name in os.environ or (os.cpu_count() or 1) >= 4:
        yield
        return
    os.environ[name] = "2"
    try:
        yield
    finally:
        del os.environ[name]


def _bytes_made(
    files: Checkpoint, sizes: dict[str, tuple[int, int]], bits: int, group_size: int, budget: float | None
) -> int:
    """About what the base takes on a disk: 2 bytes for each number that stays; the least, where nobody knows which."""
    numbers = sum(prod(tensor.shape) for tensor in files.tensors.values())
    weights = sum(n * k for n, k in sizes.values()) or numbers
    a_weight = min(budget, 16.0) if budget else bits + ((16 + bits) / group_size if group_size > 0 else 0)
    return int(2 * (numbers - weights) + weights * a_weight / 8)


def _tell_what_is_rounded(stated: object, computed: torch.dtype) -> None:
    """GPTQModel keeps what it does not quantize in bfloat16 on every CPU, and everywhere of a float32 model."""
    if stated in (torch.float16, torch.float32) and stated != computed:
        logger.warning(
            "embeddings, norms and all else that is not quantized are rounded from %s to %s%s.",
            stated, computed, "; on a GPU they would not be" if stated == torch.float16 else "",
        )  # fmt: skip


def _sizes(folder: Path, model: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """``(N, K)`` of every linear that GPTQModel will quantize; none of a family that it does not know by name."""
    from gptqmodel.models.auto import check_and_get_model_definition

    family = check_and_get_model_definition(str(folder), trust_remote_code=False)
    if family.module_tree is None:
        return {}
    blocks = family.simple_layer_modules(model.config, None)
    return sizes_in_layers(model, family.extract_layers_node(), {leaf for block in blocks for leaf in block})
