"""Measure several models on several sets of data: checked first, loaded one after the other, a row each as it comes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.evaluate import StoredLogits, mean_loss, stored_logits
from qalora_plugin.eval.examples import Example, Row, as_examples, read_rows
from qalora_plugin.eval.generation import Judge, exact_match
from qalora_plugin.eval.models import Subject
from qalora_plugin.eval.results import Result
from qalora_plugin.eval.tasks import Tasks
from qalora_plugin.eval.tokens import read_texts, require_ids, tokenize


@dataclass(frozen=True)
class Data:
    """A set of data: texts, or rows; with a judge where answers are to be generated for the first rows."""

    name: str
    texts: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    asked: tuple[Row, ...] = ()
    judge: Judge | None = None


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        length: tokens of a sequence that texts are cut into. tokens: most tokens of a text.
        rows: most rows of a set; None: all. kl_tokens: tokens that the divergence is measured over, of each set.
        generate: rows to answer. answer_pattern: see :class:`.Judge`.
    """

    dtype: str = "float32"
    device: str = "cpu"
    length: int = 512
    tokens: int = 1 << 16
    rows: int | None = None
    kl_tokens: int = 4096
    generate: int = 0
    max_new_tokens: int = 256
    answer_pattern: str | None = None


@dataclass
class Plan:
    """Everything that can be wrong was looked for.

    Attributes:
        examples: of every model (the reference among them, at the end) and set of data.
    """

    subjects: list[Subject]
    data: list[Data]
    settings: Settings
    reference: Subject | None = None
    tasks: Tasks | None = None
    examples: list[list[list[Example]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plan(
    subjects: list[Subject],
    texts: Sequence[Path],
    sets: Sequence[Path],
    settings: Settings,
    reference: Subject | None = None,
    tasks: Tasks | None = None,
) -> Plan:
    """Read and tokenize everything, before any model is loaded.

    Args:
        texts: files as for ``read_texts``. sets: files of rows.

    Raises:
        QALoraError: nothing to measure, data that cannot be read, a model without a tokenizer, answers to be generated
            to mere text, or a reference whose tokens are not a model's.
    """
    names = _names([*texts, *sets])
    data = [Data(name, texts=tuple(read_texts(path))) for name, path in zip(names, texts, strict=False)]
    data += [_data_set(name, path, settings) for name, path in zip(names[len(texts) :], sets, strict=True)]
    if not data and tasks is None:
        raise QALoraError("there is nothing to measure. Pass --text FILE, --jsonl FILE or --tasks NAMES.")
    if settings.generate and not any(one.asked for one in data):
        raise QALoraError("--generate needs questions with answers. Pass them: --jsonl FILE.")
    made = Plan(subjects, data, settings, reference, tasks)
    for subject in [*subjects, *([reference] if reference else [])]:
        made.examples.append([_examples(made, subject, one) for one in data])
        require_ids((one.ids for part in made.examples[-1] for one in part), subject.vocabulary, subject.label)
    if reference is not None:
        for subject, examples in zip(subjects, made.examples, strict=False):
            if examples != made.examples[-1]:
                raise QALoraError(
                    f"{subject.label} and the reference {reference.label} make other tokens of the same text: there is "
                    "no KL between them. Pass a reference with the same tokenizer and chat template."
                )
            if subject.vocabulary != reference.vocabulary:
                raise QALoraError(
                    f"{subject.label} gives {subject.vocabulary} logits a token, the reference {reference.label} "
                    f"{reference.vocabulary}: there is no KL between them. Pass one with the same vocabulary."
                )
    elif any(examples != made.examples[0] for examples in made.examples):
        made.notes.append("tokenizers or chat templates differ: losses a token of these models cannot be compared")
    return made


def _names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many folders before them as tell them apart.

    Raises:
        QALoraError: a file is there twice.
    """
    absolute = [path.absolute() for path in paths]
    if twice := [path for i, path in enumerate(absolute) if path in absolute[:i]]:
        raise QALoraError(f"{twice[0]} is there twice. Pass it once.")
    parts = 1
    while len({path.parts[-parts:] for path in absolute}) < len(absolute):
        parts += 1
    return ["/".join(path.parts[-parts:]) for path in absolute]


def _data_set(name: str, path: Path, settings: Settings) -> Data:
    rows = tuple(read_rows(path, settings.rows))
    asked = tuple(row for row in rows if row.messages)[: settings.generate]
    judge = Judge(asked, settings.answer_pattern) if asked else None
    return Data(name, rows=rows, asked=asked, judge=judge)


def _examples(made: Plan, subject: Subject, data: Data) -> list[Example]:
    settings, longest = made.settings, subject.longest
    if data.texts:
        length = subject.fitting_length(settings.length)
        return [Example(ids) for ids in tokenize(subject.tokenizer, list(data.texts), settings.tokens, length)]
    examples, left_out = as_examples(data.rows, subject.tokenizer, longest)
    unfit = f"longer than the {longest} tokens of a model, or have no second token to predict"
    if not examples:
        raise QALoraError(f"all rows of {data.name} are {unfit}: {subject.label}. Pass others.")
    if left_out:
        made.notes.append(
            f"{left_out} of {len(data.rows)} rows of {data.name} are {unfit}, and left out: {subject.label}"
        )
    return examples


def measure(made: Plan, progress: bool = False) -> Iterator[list[Result]]:
    """Results of each model in turn, one of them in memory at a time; of the reference, first, the logits wait on disk.

    Raises:
        QALoraError: a model cannot be loaded, or a task cannot be run.
    """
    dtype = getattr(torch, made.settings.dtype)
    with ExitStack() as stack:
        stored: list[StoredLogits | None] = [None] * len(made.data)
        if made.reference is not None and made.data:
            with made.reference.loaded(dtype, made.settings.device) as model:
                for i, counted in enumerate(made.examples[-1]):
                    opened = stored_logits(model, counted, made.settings.kl_tokens, progress)
                    stored[i] = logits = stack.enter_context(opened)
                    if not all(np.isfinite(row.max()) for row in logits.array):  # -inf alone is probability 0
                        raise _not_finite(
                            made, f"the reference {made.reference.label} has no likeliest token", made.data[i]
                        )
        for subject, examples in zip(made.subjects, made.examples, strict=False):
            with subject.loaded(dtype, made.settings.device) as model:
                yield list(_measured(made, subject, model, examples, stored, progress))


def _measured(
    made: Plan,
    subject: Subject,
    model: Any,
    examples: list[list[Example]],
    stored: list[StoredLogits | None],
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
        answers = _answers(made.settings, subject, model, data, progress, about)
        yield Result(
            **facts,
            data=data.name,
            tokens=found.tokens,
            loss=found.loss,
            perplexity=found.perplexity,
            top1=found.top1,
            kl=found.kl,
            kl_tokens=found.kl_tokens or None,
            **answers,
            seconds=round(time.monotonic() - started, 1),
        )
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
