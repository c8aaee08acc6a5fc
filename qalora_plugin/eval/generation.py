"""Answers that a model writes, greedily, and how many of them end in the right one: with its reasoning and without.

gsm8k's answers reason first and give the result after ``####``. *With* reasoning the model writes on its own, and the
result is taken out of what it wrote. *Without*, ``####`` is put in its mouth, so that the result is all that it can
give; where answers have no such mark, it is asked for the result alone.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.progress import track
from qalora_plugin.eval.evaluate import evaluating
from qalora_plugin.eval.examples import Row, prompt_ids
from qalora_plugin.eval.limits import positions, vocabulary
from qalora_plugin.eval.logits import full_precision

MARK = "####"
_AFTER_MARK = rf"{MARK}[ \t]*([^\n]+)"
_ASK = "\n\nGive the final answer only."
AT_ONCE = 16  # rows
SHORT = 48  # tokens of a result without reasoning; its first line counts


@dataclass(frozen=True)
class Answers:
    """How generated answers compare.

    Attributes:
        texts: what was written, by row. results: what was taken for the result in each; None: nothing was.
        right: how many results are the row's. unfinished: how many texts reached the most tokens.
    """

    texts: list[str]
    results: list[str | None]
    right: int
    unfinished: int

    @property
    def share(self) -> float:
        return self.right / len(self.texts)


class Judge:
    """Takes results out of answers and compares them; numbers as gsm8k does: no ``$``, no ``,`` and no final dot.

    Attributes:
        marked: results stand behind :data:`MARK`. reasons: whether answers hold more than the result.
    """

    def __init__(self, rows: Sequence[Row], pattern: str | None = None):
        """
        Args:
            pattern: a regular expression of the result, its first group if it has any, where it first matches.
                Default: what stands behind ``####`` if answers have that, else the whole answer.

        Raises:
            QALoraError: no rows, no regular expression, an answer has no result by it, or some have ``####``, others
                not or more than once.
        """
        if not rows:
            raise QALoraError("there is no row to answer. Pass rows with questions and answers.")
        marks = [row.answer.count(MARK) for row in rows] if pattern is None else []
        self.marked = any(marks)
        if odd := next((row for row, count in zip(rows, marks, strict=False) if self.marked and count != 1), None):
            raise QALoraError(
                f"the answer {odd.answer[-80:]!r} has {MARK} {odd.answer.count(MARK)} times, and others have it before "
                f"their result. Give every answer one {MARK}, or pass an --answer-pattern that finds the results."
            )
        try:
            self._pattern = re.compile((_AFTER_MARK if self.marked else r"(?s)\s*(.+)") if pattern is None else pattern)
        except re.error as error:
            raise QALoraError(f"--answer-pattern {pattern!r} is no regular expression: {error}.") from error
        found = [self.result(row.answer) for row in rows]
        for row, result in zip(rows, found, strict=True):
            if not result:
                raise QALoraError(
                    f"the answer {row.answer[-80:]!r} has nothing that {self._pattern.pattern!r} finds. Pass an "
                    "--answer-pattern that finds the result in every answer."
                )
        self.wanted = [result for result in found if result is not None]
        pairs = zip(rows, self.wanted, strict=True)
        self.reasons = any(_plain(row.answer) != result for row, result in pairs)

    def result(self, text: str) -> str | None:
        """The result in an answer, in the form that is compared."""
        match = self._pattern.search(text)
        return None if match is None else _plain(match[1] if self._pattern.groups and match[1] else match[0])

    def answers(self, texts: list[str], unfinished: int, with_reasoning: bool) -> Answers:
        """Judge what was written for the rows, in their order."""
        results = [self.result(text) if with_reasoning else self._alone(text) for text in texts]
        right = sum(found == wanted for found, wanted in zip(results, self.wanted, strict=True))
        return Answers(texts, results, right, unfinished)

    def _alone(self, text: str) -> str | None:
        lines = text.strip().splitlines()
        if not lines:
            return None
        found = None if self.marked else self.result(lines[0])
        return found or _plain(lines[0])  # a result that was asked for alone need not stand as one does in an answer


def exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    judge: Judge,
    with_reasoning: bool = True,
    max_new_tokens: int = 256,
    progress: bool = False,
    description: str = "answers",
) -> Answers:
    """Let a model answer and compare.

    Args:
        judge: of the same rows.
        with_reasoning: let it write; else only the result, in 48 tokens at most.
        max_new_tokens: with reasoning.
    """
    most = max_new_tokens if with_reasoning or not judge.reasons else min(max_new_tokens, SHORT)
    forced = "" if with_reasoning or not judge.marked else MARK
    if not with_reasoning and judge.reasons and not judge.marked:
        rows = [row.asking(_ASK) for row in rows]
    asked = [row.before_answer(tokenizer) + forced if forced else row.prompt(tokenizer) for row in rows]
    prompts = [prompt_ids(tokenizer, prompt) for prompt in asked]
    ends = rows[0].ends(tokenizer)
    texts, unfinished = generate(model, tokenizer, prompts, most, progress, description, ends)
    return judge.answers(texts, unfinished, with_reasoning or not judge.reasons)


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    progress: bool = False,
    description: str = "answers",
    more_ends: Sequence[int] = (),
    at_once: int = AT_ONCE,
) -> tuple[list[str], int]:
    """Greedy continuations of token ids, batched, padded on the left; and how many did not come to an end.

    None goes beyond the sequence that the model takes: a prompt that fills it has an empty continuation.

    Args:
        more_ends: tokens that end an answer, beside those that tokenizer and generation config name.
    """
    ends = _ends(model, tokenizer, more_ends)
    known = vocabulary(model.config)  # a [PAD] that was added to a tokenizer often has no embedding
    pads = (pad for pad in (tokenizer.pad_token_id, *ends) if pad is not None and (known is None or 0 <= pad < known))
    pad = next(pads, 0)
    most = positions(model.config)
    texts, unfinished = [""] * len(prompts), 0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    fitting = [i for i in order if most is None or len(prompts[i]) + max_new_tokens <= most]
    batches = [fitting[start : start + at_once] for start in range(0, len(fitting), at_once)]
    batches += [[i] for i in order[len(fitting) :]]  # each has a room of its own
    with evaluating(model), _greedy(model), full_precision():
        for numbers in track(batches, description, shown=progress):
            longest = max(len(prompts[i]) for i in numbers)
            room = max_new_tokens if most is None else min(max_new_tokens, most - longest)
            if room < 1:
                unfinished += len(numbers)
                continue
            padding = [longest - len(prompts[i]) for i in numbers]
            ids = [[pad] * count + prompts[i] for count, i in zip(padding, numbers, strict=True)]
            mask = [[0] * count + [1] * (longest - count) for count in padding]
            given = {"input_ids": ids, "attention_mask": mask}
            tensors = {key: torch.tensor(value, device=model.device) for key, value in given.items()}
            written = model.generate(
                **tensors, max_new_tokens=room, do_sample=False, eos_token_id=ends or None, pad_token_id=pad
            )[:, longest:].tolist()
            for i, new in zip(numbers, written, strict=True):
                stop = next((at for at, token in enumerate(new) if token in ends), None)
                unfinished += stop is None
                texts[i] = tokenizer.decode(new[:stop], skip_special_tokens=True)
    return texts, unfinished


@contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """Nothing of the model's own generation config, which fills in whatever is not said: beams, penalties, suppressed
    tokens, texts to stop at."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _ends(model: Any, tokenizer: Any, more: Sequence[int]) -> list[int]:
    """Tokens that end an answer: the tokenizer's, those that the model's generation config names, and ``more``."""
    config = getattr(model, "generation_config", None)
    stated = getattr(config, "eos_token_id", None)
    listed: Iterable[int] = stated if isinstance(stated, list) else [] if stated is None else [stated]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *listed, *more]))


def _plain(result: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))|\$", "", result).strip().rstrip(".").strip()
