"""What every linear of a 16-bit model loses at every choice of bits and group size.

    cost = Σ_n f[n]·Σ_k h[k]·(w[k,n] − ŵ[k,n])²

Without Fisher information f is 1 and h[k] the mean of x[k]² over calibration text: the error of the layer's output, if
inputs were independent, by the diagonal of GPTQ's Hessian (GPTQ, arXiv 2210.17323). It does not know what an output is
worth to the model.

Fisher information does, by which LQ-LoRA (arXiv 2311.12023) weights. Of its diagonal, F[k,n] = mean of x[k]²·g[n]²
over tokens, g the loss's gradient by the output, K + N numbers a linear are kept, the sums of its rows and columns:

    h[k] = Σ_n F[k,n] = mean of ‖g‖²·x[k]²      f[n] = Σ_k F[k,n] / ΣF,  Σ_k F[k,n] = mean of ‖x‖²·g[n]²

(K-FAC, arXiv 1503.05671, has the mean of x² times that of g², and takes tokens of huge inputs that the loss does not
depend on, the first ones of a text, for its dearest: by up to ten times too much.) Half of the costs' sum is about the
KL divergence of the rounded model from the 16-bit one, nats a token.

ŵ is rounded to nearest on a grid that is clipped as far as it pays, which is not what GPTQ will make of it, but ranks
layers as GPTQ's errors do.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.progress import track
from qalora_plugin.core.words import codes_per_period
from qalora_plugin.formats.fusion import FUSED
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
    with _moments(linears, fisher) as moments, _differentiable(model, fisher):
        for ids in track(list(sequences), "calibrating", shown=progress):
            tokens = torch.tensor([ids], device=device)
            if fisher:
                (model(tokens, labels=tokens, use_cache=False).loss * (len(ids) - 1)).backward()
            else:
                model(tokens, use_cache=False)
    for name, seen in moments.items():
        if not seen.reached:
            raise _cannot_tell(f"{name} is not reached by calibration text")
    costs = {
        name: _costs(as_matrix(linear), *moments[name].weights(), choices)
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
        tuple((rows, columns) for rows, columns in (as_matrix(linears[name]).shape for name in names)),
        {choice: sum(costs[name][choice] for name in names) for choice in sorted(possible)},
        act_order,
    )


class _Moments:
    """Of a linear's inputs ``[K]``, and by Fisher information of its outputs ``[N]``: means over tokens, on the CPU."""

    def __init__(self, linear: Linear):
        self.outputs, self.inputs = map(torch.zeros, as_matrix(linear).shape)
        self.tokens, self.reached = 0, False

    def see(self, x: Tensor, gradient: Tensor | None = None) -> None:
        """Count tokens; ``x`` ``[T, K]``, ``gradient`` ``[T, N]`` of the loss by the output, where there is one."""
        before, self.tokens = self.tokens, self.tokens + len(x)
        x = x.float().square()
        if gradient is not None:
            gradient = gradient.float().square()
            outputs = (x.sum(1, keepdim=True) * gradient).sum(0).cpu()
            self.outputs = (outputs + before * self.outputs) / self.tokens
            x = gradient.sum(1, keepdim=True) * x
        self.inputs = (x.sum(0).cpu() + before * self.inputs) / self.tokens

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """h ``[K]`` and f ``[N]``, None for 1, of the module's formulas."""
        return self.inputs, self.outputs / self.inputs.sum().clamp(min=1e-30) if self.outputs.any() else None


@contextmanager
def _moments(linears: Mapping[str, Linear], fisher: bool) -> Iterator[dict[str, _Moments]]:
    """Those of what each linear is given in the block, and of its outputs' gradients."""
    moments = {name: _Moments(linear) for name, linear in linears.items()}

    def hook(name: str, x: Tensor, y: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        moments[name].reached |= bool(x.any())
        if not fisher:
            moments[name].see(x)
        elif y.requires_grad:
            y.register_hook(lambda gradient: moments[name].see(x, gradient.flatten(0, -2)))

    handles = [
        linear.register_forward_hook(lambda _, args, y, name=name: hook(name, args[0], y))
        for name, linear in linears.items()
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _differentiable(model: "PreTrainedModel", fisher: bool) -> Iterator[None]:
    """Let embeddings have a gradient, or nothing would have one in a model that does not train."""
    if not fisher:
        with torch.no_grad():
            yield
        return
    handle = model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.detach().requires_grad_().clone())
    try:
        with torch.enable_grad():
            yield
    finally:
        handle.remove()


def _costs(weight: Tensor, inputs: Tensor, outputs: Tensor | None, choices: Sequence[Choice]) -> dict[Choice, float]:
    """Of a weight ``[N, K]``, for every choice whose group size divides K; second moments ``[K]`` and ``[N]``."""
    weight, inputs = weight.detach().float(), inputs.to(weight.device)
    outputs = torch.ones(len(weight), device=weight.device) if outputs is None else outputs.to(weight.device)
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
