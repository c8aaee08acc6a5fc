"""What every linear of a 16-bit model loses at every choice of bits and group size, weighted by its inputs.

    cost = Σ_k h[k]·Σ_n (w[k,n] − ŵ[k,n])²          h[k] = mean of x[k]² over calibration text

That is the error of the layer's output, if inputs were independent: the diagonal of GPTQ's Hessian (GPTQ, arXiv
2210.17323). It does not know what an output is worth to the model. Fisher information does, by which LQ-LoRA (arXiv
2311.12023) weights; here in the form of its diagonal that takes K + N numbers a linear (K-FAC, arXiv 1503.05671):

    cost = Σ_n f[n]·Σ_k h[k]·(w[k,n] − ŵ[k,n])²      f[n] = mean of the square of the loss's gradient by y[n]

ŵ is rounded to nearest on a grid that is clipped as
far as it pays, which is not what GPTQ will make of it, but ranks layers as GPTQ's errors do.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.progress import track
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.formats.fusion import FUSED
from qalora_plugin.formats.served_bits import INDEX_BITS
from qalora_plugin.methods.bit_allocation import CHOICES, Choice, Layer
from qalora_plugin.methods.dense_source import Linear, as_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)  # shares of a group's range that the grid covers


def measure(
    model: "PreTrainedModel",
    linears: Mapping[str, Linear],
    sequences: Iterable[list[int]],
    fisher: bool = False,
    act_order: bool = False,
    choices: Sequence[Choice] = CHOICES,
    progress: bool = True,
) -> list[Layer]:
    """The layers of ``linears``, by name, with the cost of every choice that their sizes allow.

    Args:
        sequences: token ids of calibration text. fisher: weight by it; takes a backward pass. act_order: of what will
            be made of them. choices: to measure.

    Raises:
        QALoraError: a linear that no text comes to, or that holds or is given NaN: nothing says what it would lose.
    """
    device = next(model.parameters()).device
    model.requires_grad_(False)
    with ExitStack() as stack:
        inputs = stack.enter_context(_second_moments(linears))
        outputs = stack.enter_context(_second_moments(linears, of_gradients=True)) if fisher else {}
        stack.enter_context(torch.set_grad_enabled(fisher))
        for ids in track(list(sequences), "calibrating", shown=progress):
            tokens = torch.tensor([ids], device=device)
            if fisher:
                embedded = model.get_input_embeddings()(tokens).requires_grad_()  # or nothing would have a gradient
                (model(inputs_embeds=embedded, labels=tokens, use_cache=False).loss * (len(ids) - 1)).backward()
            else:
                model(tokens, use_cache=False)
    for name in linears:
        if not inputs[name].any():
            raise _cannot_tell(f"{name} is not reached by calibration text")
    costs = {
        name: _costs(as_matrix(linear), inputs[name], outputs.get(name), choices)
        for name, linear in track(linears.items(), "measuring", shown=progress)
    }
    for name, found in costs.items():
        if not all(map(math.isfinite, found.values())):
            raise _cannot_tell(f"{name} holds NaN or Inf, or is given them")
    return [_layer(names, linears, costs, act_order) for names in fused(linears)]


def _cannot_tell(why: str) -> QALoraError:
    return QALoraError(
        f"{why}, so nothing says what it loses at fewer bits. Give bits and group_size instead of a budget, or another "
        "model."
    )


def sizes(linears: Mapping[str, Linear], act_order: bool = False, choices: Sequence[Choice] = CHOICES) -> list[Layer]:
    """The layers of ``linears``, and which choices their sizes allow; costs are not known yet, and 0."""
    free = {name: dict.fromkeys(_fitting(as_matrix(linear), choices), 0.0) for name, linear in linears.items()}
    return [_layer(names, linears, free, act_order) for names in fused(linears)]


def fused(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names of linears, those together that vLLM runs as one."""
    together: dict[tuple[str, object], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        group: object = next((parts for parts in FUSED if leaf in parts), leaf)
        together.setdefault((parent, group), []).append(name)
    return [tuple(found) for found in together.values()]


def _layer(
    names: tuple[str, ...], linears: Mapping[str, Linear], costs: Mapping[str, dict[Choice, float]], act_order: bool
) -> Layer:
    possible = set.intersection(*(set(costs[name]) for name in names))
    return Layer(
        names,
        sum(linears[name].weight.numel() for name in names),
        {choice: sum(costs[name][choice] for name in names) for choice in sorted(possible)},
        sum(INDEX_BITS * as_matrix(linears[name]).shape[1] for name in names) if act_order else 0,
    )


@contextmanager
def _second_moments(linears: Mapping[str, Linear], of_gradients: bool = False) -> Iterator[dict[str, Tensor]]:
    """``mean x²`` ``[K]``, float32, of what each linear is given in the block; or ``[N]``, of its output's gradient."""
    moments = {name: torch.zeros(as_matrix(linear).shape[0 if of_gradients else 1]) for name, linear in linears.items()}
    seen = dict.fromkeys(linears, 0)

    def note(name: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        seen[name] += len(x)
        moments[name] += (x.square().sum(0).cpu() - len(x) * moments[name]) / seen[name]

    def hook(name: str, linear: Linear) -> RemovableHandle:
        if of_gradients:
            return linear.register_full_backward_hook(
                lambda _, __, gradients: note(name, cast(tuple[Tensor], gradients)[0])
            )
        return linear.register_forward_pre_hook(lambda _, args: note(name, args[0]))

    handles = [hook(name, linear) for name, linear in linears.items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _costs(weight: Tensor, inputs: Tensor, outputs: Tensor | None, choices: Sequence[Choice]) -> dict[Choice, float]:
    """Of a weight ``[N, K]``, for every choice whose group size divides K; second moments ``[K]`` and ``[N]``."""
    weight, inputs = weight.detach().float(), inputs.to(weight.device)
    outputs = torch.ones(len(weight)) if outputs is None else outputs
    outputs = outputs.to(weight.device)
    return {choice: _rounding_error(weight, inputs, choice, outputs) for choice in _fitting(weight, choices)}


def _fitting(weight: Tensor, choices: Sequence[Choice]) -> list[Choice]:
    """Those of whole groups and of codes that fill whole words."""
    return [
        choice
        for choice in choices
        if weight.shape[1] % choice.group_size == 0
        and all(size % codes_per_period(choice.bits) == 0 for size in weight.shape)
    ]


def _rounding_error(weight: Tensor, inputs: Tensor, choice: Choice, outputs: Tensor) -> float:
    grouped = weight.unflatten(1, (-1, choice.group_size))
    importance = inputs.view(1, -1, choice.group_size)
    top = 2**choice.bits - 1
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
    best = torch.full(low.shape, torch.inf, device=weight.device)
    for clip in _CLIPS:
        step = ((high - low) * clip / top).clamp(min=1e-9)
        zero = (-low * clip / step).round()
        rounded = ((grouped / step + zero).round().clamp(0, top) - zero) * step
        best = torch.minimum(best, ((grouped - rounded).square() * importance).sum(-1, keepdim=True))
    return (best.sum((1, 2)) * outputs).sum().item()
