"""What linears are given on calibration text, in a 16-bit model and in its quantized base, block after block.

A 16-bit model that is larger than the memory can be read so: its weights stay in the files, mapped (transformers does
that on a CPU for weights whose dtype it keeps), and a copy of one block at a time runs all sequences where the base's
own block is. What is held besides are the hidden states of all sequences, twice.

Blocks are called as the model's own code calls them: once, each is replaced by one that does nothing but keep its
arguments (masks, rotary angles, whatever a class passes), and from then on they are called without the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, cast

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


class Moments(NamedTuple):
    """Of a linear's inputs: X ``[T, K]`` in the base, with what its adapter is by then, X₁₆ in the 16-bit model.

    Attributes:
        hessian: ``XᵀX/T`` ``[K, K]``, float32. drift: ``Xᵀ(X₁₆ − X)/T`` ``[K, K]``, float32. tokens: T.
    """

    hessian: Tensor
    drift: Tensor
    tokens: int


@torch.no_grad()
def moments(
    dense: nn.Module, base: nn.Module, blocks: str, names: Sequence[str], sequences: Sequence[list[int]],
    progress: Progress,
) -> Iterator[tuple[list[str], Moments]]:  # fmt: skip
    """Linears that are given the same (q, k, v; gate, up), and its moments, in the order of the computation.

    Whoever changes such linears of ``base`` before the next are asked for changes what those are given. A linear that
    the first sequence does not come to is in none.

    Args:
        dense: the 16-bit model, on the CPU. base: where it computes. blocks: name of their list in both.
        names: of linears in ``blocks``. sequences: token ids.

    Raises:
        QALoraError: the model does more between its blocks than hand on hidden states.
    """
    flows = [_Flow(model, blocks, sequences) for model in (dense, base)]
    task = progress.add_task("calibrating", total=(count := len(flows[0].blocks)))
    for i in range(count):
        _copy_into(flows[0], flows[1].enter(i), i)
        prefix = f"{blocks}.{i}."
        stages = flows[1].stages([name.removeprefix(prefix) for name in names if name.startswith(prefix)])
        for stage in stages:
            hessian = drift = torch.zeros(())
            tokens = 0
            for k in range(len(sequences)):
                progress.advance(task, 1 / len(sequences) / (len(stages) + 1))
                given16, given = (flow.input_of(stage[0], k) for flow in flows)
                if given16 is None or given is None:
                    continue
                x16, x = given16.flatten(0, -2).float(), given.flatten(0, -2).float()
                hessian = hessian.to(x.device) + x.t() @ x
                drift = drift.to(x.device) + x.t() @ (x16.to(x.device) - x)
                tokens += len(x)
            if tokens:
                yield [prefix + name for name in stage], Moments(hessian / tokens, drift / tokens, tokens)
        for k in range(len(sequences)):
            for flow in flows:
                flow.go_on(k)
            progress.advance(task, 1 / len(sequences) / (len(stages) + 1))


class _Flow:
    """The hidden states of all sequences, on their way through the blocks of one model.

    Attributes:
        block: the one that they are before. dtype: of all that is not a whole number; None: as it is.
    """

    def __init__(self, model: nn.Module, blocks: str, sequences: Sequence[list[int]]):
        self.blocks = cast(nn.ModuleList, model.get_submodule(blocks))
        others = _others_returned(model, self.blocks[0], sequences[0])
        self.states = [_captured(model, self.blocks, ids, others) for ids in sequences]
        self.block, self.at, self.dtype = self.blocks[0], 0, cast(torch.dtype | None, None)

    def enter(self, i: int) -> nn.Module:
        self.block, self.at = self.blocks[i], i
        return self.block

    def stages(self, names: Sequence[str]) -> list[list[str]]:
        """Those of the linears that the first sequence comes to, in that order, together if given the same tensor."""
        found: list[tuple[Tensor, list[str]]] = []

        def note(name: str, x: Tensor) -> None:
            if any(name in stage for _, stage in found):
                return
            if not found or found[-1][0] is not x:
                found.append((x, []))
            found[-1][1].append(name)

        with _hooked({name: partial(note, name) for name in names}, self.block):
            self._run(0)
        return [stage for _, stage in found]

    def input_of(self, name: str, k: int) -> Tensor | None:
        """What a linear of the block is given of sequence ``k``, ``[…, K]``; None: it does not come there. (What comes
        after the linear is not computed.)
        """
        seen: list[Tensor] = []

        def note(x: Tensor) -> None:
            seen.append(x)
            raise _Captured

        with _hooked({name: note}, self.block), suppress(_Captured):
            self._run(k)
        return seen[0] if seen else None

    def go_on(self, k: int) -> None:
        state = self.states[k]
        state.hidden = self._run(k).cpu()
        state.calls[self.at] = ((), {})

    def _run(self, k: int) -> Tensor:
        state = self.states[k]
        arguments, keywords = state.calls[self.at]
        device = next(chain(self.block.parameters(), self.block.buffers())).device
        hidden, *others = _moved((state.hidden, *arguments), device, self.dtype)
        found = self.block(hidden, *others, **_moved(keywords, device, self.dtype))
        return found[0] if isinstance(found, tuple) else found


def _copy_into(flow: _Flow, beside: nn.Module, i: int) -> None:
    """Let a flow go through a copy of its model's block, on the device of the other's, in a dtype it multiplies."""
    block = deepcopy(flow.enter(i))
    device = next(chain(beside.parameters(), beside.buffers())).device
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    flow.dtype = gemm_dtype(dtype, device)
    flow.block = block.to(device, flow.dtype)


@contextmanager
def _hooked(seen: Mapping[str, Callable[[Tensor], None]], block: nn.Module) -> Iterator[None]:
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, note=note: note(args[0]))
        for name, note in seen.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _run(model: Any, ids: list[int]) -> None:
    with suppress(_Captured):
        model(torch.tensor([ids], device=model.device), use_cache=False)


@contextmanager
def _replaced(forwards: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    before = [module.__dict__.get("forward") for module, _ in forwards]  # accelerate has some of its own there
    for module, forward in forwards:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for (module, _), was in zip(forwards, before, strict=True):
            del module.__dict__["forward"]
            if was is not None:
                module.__dict__["forward"] = was


def _moved(values: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Nested arguments on the device that computes, what is not a whole number in its dtype."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if dtype and value.is_floating_point() else value.dtype)

    return tree_map(moved, values)


def _cannot_be_streamed(model: nn.Module) -> QALoraError:
    return QALoraError(
        f"{type(model).__name__} does more between its blocks than hand on hidden states, or leaves some out, so it "
        "cannot be calibrated block by block. Leave init out: the adapter then starts at zero."
    )
