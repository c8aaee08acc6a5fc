"""Measure several models on several sets of data: loaded one after the other, a row each as it comes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import torch

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.evaluate import StoredLogits, looks_ahead, mean_loss, stored_logits
from qalora_plugin.eval.examples import Example
from qalora_plugin.eval.generation import exact_match
from qalora_plugin.eval.models import Subject
from qalora_plugin.eval.planning import Data, Plan, Settings
from qalora_plugin.eval.results import Result


def measure(made: Plan, progress: bool = False) -> Iterator[Result]:
    """Results as they come, one model in memory at a time; of the reference, first, the logits wait on disk.

    Raises:
        QALoraError: a model cannot be loaded, its figures would mean nothing, or a task cannot be run.
    """
    with ExitStack() as stack:
        stored: Sequence[StoredLogits | None] = [None] * len(made.data)
        if made.reference is not None and made.data:
            stored = _reference_logits(made, made.reference, stack, progress)
        for subject, examples in zip(made.subjects, made.examples, strict=False):
            yield from _measured(made, subject, examples, stored, progress)


@contextmanager
def _loaded(made: Plan, subject: Subject) -> Iterator[Any]:
    """Its model, whose memory is free again afterwards if nobody keeps it."""
    try:
        with subject.loaded(getattr(torch, made.settings.dtype), made.settings.device) as model:
            if made.data and looks_ahead(model):
                raise QALoraError(
                    f"{subject.label}, a {type(model).__name__}, sees the whole text at once: what it says of a token "
                    "depends on later ones, and losses of it mean nothing. Measure it with --tasks, or leave it out."
                )
            yield model
            del model
    except torch.OutOfMemoryError as error:
        raise QALoraError(
            f"{subject.label} does not fit the memory of {made.settings.device} ({error}). Pass --dtype bfloat16, "
            "--device cpu, or a device with more memory."
        ) from error


def _reference_logits(
    made: Plan, reference: Subject, stack: ExitStack, progress: bool
) -> Sequence[StoredLogits | None]:
    found = []
    with _loaded(made, reference) as model:
        for data, counted in zip(made.data, made.examples[-1], strict=True):
            opened = stored_logits(model, counted, made.settings.kl_tokens, progress)
            found.append(stack.enter_context(opened))
            if not all(np.isfinite(row.max()) for row in found[-1].array):  # -inf alone is probability 0
                raise _not_finite(made, f"the reference {reference.label} has no likeliest token", data)
        del model, opened
    return found


def _measured(
    made: Plan, subject: Subject, examples: list[list[Example]], stored: Sequence[StoredLogits | None], progress: bool
) -> Iterator[Result]:
    with _loaded(made, subject) as model:
        yield from _results(made, subject, model, examples, stored, progress)
        del model


def _results(
    made: Plan,
    subject: Subject,
    model: Any,
    examples: list[list[Example]],
    stored: Sequence[StoredLogits | None],
    progress: bool,
) -> Iterator[Result]:
    facts: dict[str, Any] = {
        "model": subject.label,
        "kind": subject.kind,
        "size": subject.nbytes,
        "served_bits": subject.served.bits_a_weight or None,
    }
    for data, counted, reference in zip(made.data, examples, stored, strict=True):
        started = time.monotonic()
        about = f"{subject.label} · {data.name}"
        found = mean_loss(model, counted, reference, progress, f"{about} · loss")
        if not isfinite(found.loss):
            raise _not_finite(made, f"the loss of {subject.label} is {found.loss}", data)
        if found.kl is not None and not isfinite(found.kl):
            raise _not_finite(made, f"the KL of {subject.label} is {found.kl}", data)
        measured = partial(
            Result,
            **facts,
            data=data.name,
            tokens=found.tokens,
            loss=found.loss,
            perplexity=found.perplexity,
            top1=found.top1,
            kl=found.kl,
            kl_tokens=found.kl_tokens or None,
        )
        try:
            answers = _answers(made.settings, subject, model, data, progress, about)
        except BaseException:  # a Ctrl-C, too: the losses are there, and answers take far longer
            yield measured(seconds=round(time.monotonic() - started, 1))
            raise
        yield measured(**answers, seconds=round(time.monotonic() - started, 1))
    if made.tasks is not None:
        started = time.monotonic()
        for score in made.tasks.scores(model, subject.tokenizer):
            seconds = round(time.monotonic() - started, 1)
            yield Result(**facts, data=score.task, metric=score.metric, score=score.value, stderr=score.stderr,
                         seconds=seconds)  # fmt: skip


def _not_finite(made: Plan, what: str, data: Data) -> QALoraError:
    """Its weights are finite, that was looked for: so their products overflow."""
    dtype = made.settings.dtype
    return QALoraError(
        f"{what} on {data.name}: the model computes NaN or Inf in {dtype}, and no figure of it means anything. "
        + ("Pass --dtype float32." if dtype != "float32" else "Its weights are too large: download or make it again.")
    )


def _answers(
    settings: Settings, subject: Subject, model: Any, data: Data, progress: bool, about: str
) -> dict[str, Any]:
    """Shares of right answers; those without reasoning alone, where the right answers hold none."""
    judge = data.judge
    if judge is None:
        return {}
    found: dict[str, Any] = {"answered": len(data.asked)}
    for reasoned, name in ((True, "exact"), (False, "exact_direct")):
        if reasoned and not judge.reasons:
            continue
        answers = exact_match(
            model, subject.tokenizer, data.asked, judge, reasoned, settings.max_new_tokens, progress,
            f"{about} · {'reasoned' if reasoned else 'direct'} answers",
        )  # fmt: skip
        found[name] = answers.share
        if reasoned:
            found["unfinished"] = answers.unfinished
    return found
