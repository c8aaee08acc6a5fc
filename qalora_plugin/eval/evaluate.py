"""Held-out loss, top-1 accuracy, and the divergence from a reference model: of one loaded model on tokenized examples.

The divergence KL(reference ‖ model) is exact, over the whole vocabulary, though one model at a time is in memory: the
reference's float32 logits of some of the tokens wait in a file on disk, which has a size that is known beforehand.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import exp, inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qalora_plugin.checkpoint.atomic import require_space
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.core.progress import track
from qalora_plugin.eval.examples import Example
from qalora_plugin.eval.logits import full_precision

_AHEAD = 0.01  # of the largest logit; models that look ahead differ by tenths, rounding is the same for both
BATCH_TOKENS = 2048  # with padding; at 128 k words their float32 logits take 1 GB


@dataclass(frozen=True)
class Measured:
    """Means over the tokens that count.

    Attributes:
        loss: cross entropy, nats a token. top1: share of the tokens that the model finds likeliest.
        kl: KL(reference ‖ model), nats a token, over ``kl_tokens`` of them; None without a reference.
    """

    loss: float
    top1: float
    tokens: int
    kl: float | None = None
    kl_tokens: int = 0

    @property
    def perplexity(self) -> float:
        return inf if self.loss >= 700 else exp(self.loss)


class StoredLogits:
    """A reference's logits on disk, float32 ``[tokens, vocabulary]``, in the order of the examples."""

    def __init__(self, examples: Sequence[Example], tokens: int, vocabulary: int, file: Any):
        self.rows: dict[int, slice] = {}
        """Example → where its tokens are; only whole examples are stored, until there are ``tokens``."""
        for i, stop in enumerate(_stops(examples)):
            if stop > tokens and self.rows:
                break
            self.rows[i] = slice(stop - _counted(examples[i]), stop)
        self.tokens = next(reversed(self.rows.values())).stop
        require_space(Path(tempfile.gettempdir()), 4 * self.tokens * vocabulary)
        self.array = np.memmap(file, np.float32, "w+", shape=(self.tokens, vocabulary))

    @property
    def vocabulary(self) -> int:
        return self.array.shape[1]


@contextmanager
def stored_logits(
    model: Any, examples: Sequence[Example], tokens: int = 4096, progress: bool = False, batch: int = BATCH_TOKENS
) -> Iterator[StoredLogits]:
    """Run a reference model on the first examples, as many as hold ``tokens`` that count (one at least).

    The file lies where temporary files do (``TMPDIR``) and is gone afterwards. The model is let go of before.

    Raises:
        QALoraError: no token counts, or the disk has no room for them.
    """
    _require_some(examples)
    vocabulary = _vocabulary(model, examples[0])
    with ExitStack() as stack:
        with os_errors_in_one_line():
            file = stack.enter_context(tempfile.TemporaryFile())
            stored = StoredLogits(examples, tokens, vocabulary, file)
            for i, logits in _predictions(model, examples, list(stored.rows), progress, "reference", batch):
                stored.array[stored.rows[i]] = logits.cpu().numpy()
        del model
        yield stored
        del stored.array


def mean_loss(
    model: Any,
    examples: Sequence[Example],
    reference: StoredLogits | None = None,
    progress: bool = False,
    description: str = "loss",
    batch: int = BATCH_TOKENS,
) -> Measured:
    """Measure a model where it is, in the dtype it was loaded in; sums in float64, logits in float32.

    Args:
        model: of transformers or PEFT.
        reference: of the same examples.
        batch: tokens of a forward pass, padding included; memory grows with it, the result does not change.

    Raises:
        QALoraError: no token counts, or the reference has another vocabulary.
    """
    _require_some(examples)
    loss, right, tokens, divergence, compared = 0.0, 0, 0, 0.0, 0
    for i, logits in _predictions(model, examples, range(len(examples)), progress, description, batch):
        targets = torch.tensor(examples[i].ids[examples[i].start :], device=logits.device)
        log_q = logits.log_softmax(-1)
        loss -= log_q.gather(-1, targets[:, None]).double().sum().item()
        right += int((logits.argmax(-1) == targets).sum())
        tokens += len(targets)
        if reference is not None and i in reference.rows:
            if reference.vocabulary != logits.shape[-1]:
                raise QALoraError(
                    f"the reference gives {reference.vocabulary} logits a token, this model {logits.shape[-1]}: there "
                    "is no KL between them. Pass a reference with the same vocabulary."
                )
            theirs = torch.from_numpy(np.array(reference.array[reference.rows[i]])).to(logits.device)
            divergence += _divergence(theirs.log_softmax(-1), log_q)
            compared += len(targets)
    kl = divergence / compared if compared else None
    kl = 0.0 if kl is not None and kl < 0 else kl  # float32 sums of a model and itself may lie below; NaN stays
    return Measured(loss / tokens, right / tokens, tokens, kl, compared)


def _divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Sum over rows of KL(p ‖ q), nats; what one of them rounds to probability 0 adds 0 where it is p's."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -torch.inf, 0, terms).sum(-1).double().sum().item()


@torch.inference_mode()
def _predictions(
    model: Any, examples: Sequence[Example], chosen: Iterable[int], progress: bool, description: str, batch: int
) -> Iterator[tuple[int, Tensor]]:
    """Number of an example, and float32 logits ``[tokens that count, vocabulary]`` for them; in order of length.

    Padding is on the right, out of every token's sight.
    """
    batches = _batches(examples, chosen, batch)
    with evaluating(model), full_precision():
        for numbers in track(batches, description, shown=progress):
            longest = max(len(examples[i].ids) for i in numbers)
            rows = [examples[i].ids + [0] * (longest - len(examples[i].ids)) for i in numbers]
            logits = model(input_ids=torch.tensor(rows, device=model.device)).logits
            for row, i in enumerate(numbers):
                yield i, logits[row, examples[i].start - 1 : len(examples[i].ids) - 1].float()


def _batches(examples: Sequence[Example], chosen: Iterable[int], batch: int) -> list[list[int]]:
    """Examples of like length together, ``batch`` tokens at most unless one alone has more."""
    batches: list[list[int]] = []
    for i in sorted(chosen, key=lambda i: len(examples[i].ids)):
        if batches and (len(batches[-1]) + 1) * len(examples[i].ids) <= batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout; afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def looks_ahead(model: Any) -> bool:
    """Whether what a model says of a token depends on later ones, as where text is a prefix that is seen whole: then
    the losses mean nothing."""
    ids = torch.tensor([[1] * 8, [1] * 4 + [2] * 4], device=model.device)
    with evaluating(model):
        first, other = (model(input_ids=row[None]).logits[0, :4].float() for row in ids)
    return bool((first - other).abs().max() > _AHEAD * first.abs().max())


@torch.inference_mode()
def _vocabulary(model: Any, example: Example) -> int:
    """Logits a token: what the model gives, which is not always what its config says."""
    return model(input_ids=torch.tensor([example.ids[:1]], device=model.device)).logits.shape[-1]


def _require_some(examples: Sequence[Example]) -> None:
    if not any(_counted(example) > 0 for example in examples):
        raise QALoraError("no example has a token that counts: there is nothing to measure. Pass others.")


def _counted(example: Example) -> int:
    return len(example.ids) - example.start


def _stops(examples: Sequence[Example]) -> Iterator[int]:
    total = 0
    for example in examples:
        total += _counted(example)
        yield total
