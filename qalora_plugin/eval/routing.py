"""The same routing for two models that are compared: where theirs differs, it is counted and put right.

A router picks the k largest scores. Where two nearly tie, the noise of a float32 sum turns the choice over, and the
logits of two equal models then differ by as much as two experts do. So base + adapter is recorded, and the merged model
is made to follow. That hides no wrong weight: every weight is compared by itself; a router's are base tensors, compared
bit for bit; and a wrong weight moves all tokens, of which those that choose alike are left as they are, and flips far
more than the few choices that a tie explains.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPED = "base_model.model."  # what PEFT puts before a module's name


@dataclass
class Routing:
    """Choices of a run: of each experts module, in the order of its calls, index and weights ``[T, k]``.

    Attributes:
        choices: how many there are, tokens times layers.
    """

    calls: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def choices(self) -> int:
        return sum(len(index) for calls in self.calls.values() for index, _ in calls)


@dataclass
class Flips:
    """How many choices a replayed run would have made differently."""

    count: int = 0


@contextmanager
def recorded(model: nn.Module) -> Iterator[Routing]:
    """Inside, every choice of the model is kept."""
    routing = Routing()

    def record(name: str, index: Tensor, weights: Tensor) -> None:
        routing.calls[name].append((index.cpu(), weights.cpu()))

    with _at_experts(model, record):
        yield routing


@contextmanager
def replayed(model: nn.Module, routing: Routing) -> Iterator[Flips]:
    """Inside, a token that the model would route differently follows ``routing``; the same calls, in the same order."""
    flips, coming = Flips(), {name: iter(calls) for name, calls in routing.calls.items()}

    def follow(name: str, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        wanted, their_weights = (tensor.to(index.device) for tensor in next(coming[name]))
        flipped = (index.sort(-1).values != wanted.sort(-1).values).any(-1, keepdim=True)
        flips.count += int(flipped.sum())
        return torch.where(flipped, wanted, index), torch.where(flipped, their_weights, weights)

    with _at_experts(model, follow):
        yield flips


@contextmanager
def _at_experts(model: nn.Module, act: Callable[[str, Tensor, Tensor], tuple | None]) -> Iterator[None]:
    """Call ``act(name, index, weights)`` before every experts module; what it returns takes their place."""
    handles = []
    for name, module in model.named_modules():
        signature = inspect.signature(type(module).forward)
        if not {"top_k_index", "top_k_weights"} <= set(signature.parameters):
            continue

        def before(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            name: str = name,
            signature: inspect.Signature = signature,
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            given = signature.bind(module, *args, **kwargs)
            found = act(name.removeprefix(_WRAPPED), given.arguments["top_k_index"], given.arguments["top_k_weights"])
            if found is None:
                return None
            given.arguments["top_k_index"], given.arguments["top_k_weights"] = found
            return given.args[1:], given.kwargs

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
