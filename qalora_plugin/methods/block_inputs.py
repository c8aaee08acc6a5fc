"""What the linears of a 16-bit model are given on calibration text, one decoder block after another.

A model that is larger than the memory can be calibrated so: its weights stay in the files, mapped (transformers does
that on a CPU for weights whose dtype it keeps), and a copy of one block at a time runs all sequences on the device that
computes. What is held besides are the hidden states of all sequences.

Blocks are called as the model's own code calls them: once, each is replaced by one that does nothing but keep its
arguments (masks, rotary angles, whatever a class passes), and from then on they are called without the model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.kernels.hardware import gemm_dtype


class _Captured(Exception):
    """The last block was called: what the model computes of it is of no interest."""


@dataclass
class _Sequence:
    """Calls of all blocks for one sequence: hidden states before the next block, and each block's other arguments."""

    hidden: Tensor
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)


def blocks_of(model: nn.Module, names: Iterable[str]) -> tuple[str, list[str]]:
    """The list of blocks, by its name in the model, and those of the linears ``names`` that are in it.

    Raises:
        QALoraError: none of them is in a list of blocks.
    """
    inside: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        above = (".".join(parts[:i]) for i in range(1, len(parts)))
        outermost = next((path for path in above if isinstance(model.get_submodule(path), nn.ModuleList)), None)
        if outermost is not None:
            inside.setdefault(outermost, []).append(name)
    if not inside:
        raise QALoraError(
            f"{type(model).__name__} has no list of blocks that its adapted linears are in, to go through one at a "
            "time. Leave init out: the adapter then starts at zero."
        )
    return max(inside.items(), key=lambda item: len(item[1]))


@torch.no_grad()
def hessians(
    model: nn.Module, blocks: str, names: Sequence[str], sequences: Sequence[list[int]], device: torch.device,
    progress: Progress,
) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """``XᵀX/T`` ``[K, K]``, float32 on ``device``, of the inputs of the linears ``names``; a dict for each block.

    Linears that are given the same (q, k, v; gate, up) have the same tensor. A linear that no token came to has none.

    Args:
        model: on the CPU. blocks: name of their list in it. sequences: token ids.

    Raises:
        QALoraError: the model does more between its blocks than hand on hidden states.
    """
    modules = cast(nn.ModuleList, model.get_submodule(blocks))
    others = _others_returned(model, modules[0], sequences[0])
    states = [_captured(model, modules, ids, others) for ids in sequences]
    task = progress.add_task("calibrating", total=len(modules) * len(states))
    for i, module in enumerate(modules):
        block, prefix = deepcopy(module), f"{blocks}.{i}."
        dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
        dtype = gemm_dtype(dtype, device)
        block.to(device, dtype)
        gathered = _Gathered({n: block.get_submodule(n.removeprefix(prefix)) for n in names if n.startswith(prefix)})
        for state in states:
            arguments, keywords = state.calls[i]
            found = block(*_moved((state.hidden, *arguments), device, dtype), **_moved(keywords, device, dtype))
            state.hidden = _first(found).cpu()
            state.calls[i] = ((), {})
            gathered.end_of_sequence()
            progress.advance(task)
        yield gathered.means()


class _Gathered:
    """Sums of ``xᵀx`` over the inputs x of linears, one for all linears that are given the same tensor."""

    def __init__(self, linears: Mapping[str, nn.Module]):
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._owners: dict[str, str] = {}  # linear → the one whose sum is its own, too
        self._new: dict[str, Tensor] = {}  # inputs, of this sequence, of linears that had none before
        for name, linear in linears.items():
            linear.register_forward_pre_hook(lambda _, args, name=name: self._note(name, args[0]))

    def _note(self, name: str, x: Tensor) -> None:
        if name not in self._owners:
            self._owners[name] = next((other for other, seen in self._new.items() if seen is x), name)
            self._new[name] = x
        if self._owners[name] != name:
            return
        x = x.flatten(0, -2).float()
        if name not in self._sums:
            self._sums[name], self._tokens[name] = x.new_zeros(x.shape[1], x.shape[1]), 0
        self._sums[name].addmm_(x.t(), x)
        self._tokens[name] += len(x)

    def end_of_sequence(self) -> None:
        self._new.clear()

    def means(self) -> dict[str, Tensor]:
        """``XᵀX/T`` of every linear that was given something."""
        for name, total in self._sums.items():
            total /= max(self._tokens[name], 1)
        return {name: self._sums[owner] for name, owner in self._owners.items()}


def _captured(model: nn.Module, blocks: nn.ModuleList, ids: list[int], others: int | None) -> _Sequence:
    """Run the model with blocks that do nothing but keep what they are called with."""
    state: _Sequence | None = None
    handed_on: Tensor | None = None

    def stand_in(i: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal state, handed_on
        hidden = args[0] if args else kwargs.pop("hidden_states", None)
        if state is None:
            state = _Sequence(hidden)
        elif hidden is not handed_on:
            raise _cannot_be_streamed(model)
        if len(state.calls) != i or hidden is None:
            raise _cannot_be_streamed(model)
        state.calls.append((args[1:], kwargs))
        if i == len(blocks) - 1:
            raise _Captured
        handed_on = hidden.view_as(hidden)  # another object, to be known by
        return handed_on if others is None else (handed_on, *[None] * others)

    with _replaced([(block, partial(stand_in, i)) for i, block in enumerate(blocks)]):
        _run(model, ids)
    if state is None or len(state.calls) != len(blocks):
        raise _cannot_be_streamed(model)
    return state


def _others_returned(model: nn.Module, block: nn.Module, ids: list[int]) -> int | None:
    """What blocks return besides hidden states, all of it None without a cache; None for a tensor. The first is run."""
    forward, found = block.forward, []

    def run(*args: Any, **kwargs: Any) -> Any:
        found.append(forward(*args, **kwargs))
        raise _Captured

    with _replaced([(block, run)]):
        _run(model, ids[:8])
    return len(found[0]) - 1 if found and isinstance(found[0], tuple) else None


def _run(model: nn.Module, ids: list[int]) -> None:
    with suppress(_Captured):
        model(torch.tensor([ids]), use_cache=False)


@contextmanager
def _replaced(forwards: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    for module, forward in forwards:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in forwards:
            del module.__dict__["forward"]


def _moved(values: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Nested arguments on the device that computes, what is not a whole number in its dtype."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return tree_map(moved, values)


def _first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


def _cannot_be_streamed(model: nn.Module) -> QALoraError:
    return QALoraError(
        f"{type(model).__name__} does more between its blocks than hand on hidden states, or leaves some out, so it "
        "cannot be calibrated block by block. Leave init out: the adapter then starts at zero."
    )
