"""One cell of docs/formats.md: a tiny checkpoint of given bits, group size and order, taken through a conversion.

What a format is, and how to read what it wrote, is in :mod:`formats.rows`.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.fabricate import make_base
from support.gguf_files import VOCABULARY
from support.gguf_files import make_tokenizer as byte_level_tokenizer
from torch import Tensor

from qalora_plugin.conversion.merging import merge
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.opened import QuantizedCheckpoint

BITS, GROUP_SIZES = (2, 3, 4, 8), (16, 32, 64, 128, -1)
HIDDEN, RANK = 128, 4
SHIFT = 0.1  # steps that an adapter moves a weight by, in the root mean square: what training gives
EXACT = 1e-6  # of the weight: float32's own rounding

Weights = dict[str, Tensor]  # name of a linear → [K, N], float64


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors as small as these wait longer for a second thread than they take, five times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    bits: int
    act_order: bool
    group_size: int

    @property
    def line(self) -> str:
        return f"{self.bits} bit{', act-order' if self.act_order else ''}"

    @property
    def column(self) -> str:
        return f"g {self.group_size}"

    def __str__(self) -> str:
        return f"{self.line}, {self.column}"

    def sample(self, folder: Path) -> "Sample":
        return Sample(self, folder)


CASES = [Case(*one) for one in product(BITS, (False, True), GROUP_SIZES)]


class Sample:
    """The checkpoints of one case, made when they are first asked for. ``folder`` is for them and what is made of them.

    One-layer Llamas, K of 128 and 256, so that one group, and two, are among them.
    """

    def __init__(self, case: Case, folder: Path):
        self.case, self.folder = case, folder
        folder.mkdir(parents=True)

    @cached_property
    def base(self) -> Path:
        case = self.case
        return make_base(
            self.folder / "base", case.bits, case.group_size, act_order=case.act_order, hidden=HIDDEN, layers=1,
            vocabulary=VOCABULARY, tokenizer=byte_level_tokenizer(),
        )  # fmt: skip

    @cached_property
    def opened(self) -> QuantizedCheckpoint:
        return QuantizedCheckpoint.open(self.base)

    @cached_property
    def adapter(self) -> Path:
        """An adapter of ours on every linear."""
        factors = {name: (factor_a(spec.groups), self.factor_b(name)) for name, spec in self.opened.specs.items()}
        qalora = {"format_version": 1, "pooling": "sum", "base_fingerprint": self.opened.fingerprint()}
        return self.write_lora("adapter", factors, peft_type="QALORA", qalora=qalora)

    @cached_property
    def merged(self) -> Path:
        return merge(self.base, self.adapter, self.folder / "merged", "float32", progress=False).folder

    @cached_property
    def base_weights(self) -> Weights:
        return weights(self.base)

    @cached_property
    def merged_weights(self) -> Weights:
        return weights(self.merged)

    def factor_b(self, name: str) -> Tensor:
        """B ``[N, R]`` that moves the weights of a linear by :data:`SHIFT`, A being :func:`factor_a`."""
        step = self.opened.files.tensor(f"{name}.scales").float().mean(0)
        return SHIFT * step[:, None] * torch.randn(len(step), RANK, generator=torch.Generator().manual_seed(1))

    def write_lora(self, name: str, factors: dict[str, tuple[Tensor, Tensor]], **config) -> Path:
        """A folder as PEFT saves it, of A and B by the names of the linears."""
        folder = self.folder / name
        folder.mkdir()
        tensors = {
            f"base_model.model.{module}.lora_{part}.weight": factor.contiguous()
            for module, pair in factors.items()
            for part, factor in zip("AB", pair, strict=True)
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"r": RANK, "lora_alpha": RANK, "base_model_name_or_path": str(self.base), **config}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder


def factor_a(groups: int) -> Tensor:
    """A ``[R, groups]``."""
    return torch.randn(RANK, groups, generator=torch.Generator().manual_seed(2)) / RANK**0.5


def weights(folder: Path) -> Weights:
    """Every quantized linear of a GPTQ checkpoint, or of one of ours, by the definition."""
    opened = QuantizedCheckpoint.open(folder)
    return {name: reference.dequantize(opened.weight(name)) for name in opened.specs}


@dataclass(frozen=True)
class Outcome:
    """What a conversion did to the weights.

    Attributes:
        of_weight: ‖w − w₀‖/‖w₀‖ over all linears; None where the conversion was refused.
        of_adapter: ‖w − w₀‖ as a share of what the adapter adds; None where there is none.
        refusal: the reason, without the names of this one checkpoint.
    """

    of_weight: float | None = None
    of_adapter: float | None = None
    refusal: str | None = None

    def __str__(self) -> str:
        if self.of_weight is None:
            return "refused"
        if self.of_weight <= EXACT:
            return "exact"
        return _percent(self.of_weight) + ("" if self.of_adapter is None else f" · {_percent(self.of_adapter)}")


def outcome(sample: Sample, convert: "Callable[[Sample], tuple[Weights, Weights, Weights | None]]") -> Outcome:
    """Run one conversion.

    Args:
        convert: returns what came out, what should have, and the latter without the adapter (None if there is none).
    """
    try:
        found, wanted, base = convert(sample)
    except QALoraError as error:
        return Outcome(refusal=_general(str(error), sample))
    error = _norm(found[name] - wanted[name] for name in found)
    added = None if base is None else _norm(wanted[name] - base[name] for name in found)
    return Outcome(error / _norm(wanted[name] for name in found), None if added is None else error / added)


def _norm(tensors) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.1g} %"


def _general(message: str, sample: Sample) -> str:
    """A refusal without the paths and names of this checkpoint, and without its advice."""
    message = re.sub(rf"{re.escape(str(sample.folder))}[^\s:,]*", "the checkpoint", message)
    message = message.removeprefix("the checkpoint: ")
    message = re.sub(r"model\.layers\.\d+\.\S+?(?=[\s:,])", "a linear", message)
    return re.split(r"\. (?=[A-Z])", message)[0].rstrip(".")
