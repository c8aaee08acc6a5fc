"""What to calibrate on: random sequences of a text file's tokens, or of a dataset's on the Hub."""

import logging
import random
from itertools import accumulate
from typing import Any, NamedTuple

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.tokens import is_text_file, joined_text, read_texts, tokenize

logger = logging.getLogger(__name__)

_FEWEST = 512  # tokens to calibrate on


class CalibrationText(NamedTuple):
    """Texts, and how much of them to take.

    Attributes:
        dataset: where they come from. samples, length: as many tokens as so many sequences of so many.
        seed: of which ones.
    """

    dataset: str
    texts: list[str]
    samples: int
    length: int
    seed: int

    def sequences(self, tokenizer: Any, fitting: int) -> list[list[int]]:
        """Sequences of at most ``length`` tokens, ``samples·length`` in all where there are so many: of short rows
        more than ``samples``.

        Args:
            fitting: the longest sequence that the model takes.

        Raises:
            QALoraError: too little text.
        """
        length = min(self.length, fitting)
        if length < self.length:
            logger.warning("sequences of %d tokens, not %d: the model has no more positions.", length, self.length)
        shuffled = list(self.texts)
        random.Random(self.seed).shuffle(shuffled)
        sequences = tokenize(tokenizer, shuffled, 4 * self.samples * length, length)
        random.Random(self.seed).shuffle(sequences)
        sequences.sort(key=len, reverse=True)  # full-length ones first; stable, so still random among equals
        before = accumulate(map(len, sequences), initial=0)
        wanted = self.samples * length
        chosen = [sequence for sequence, tokens in zip(sequences, before, strict=False) if tokens < wanted]
        tokens = sum(map(len, chosen))
        if tokens < _FEWEST:
            raise QALoraError(
                f"{self.dataset} gives {tokens} tokens to calibrate on, of {self.samples} × {length} that were asked "
                "for; that takes some thousands. Give more text, more samples, or another dataset."
            )
        if tokens < wanted // 2:
            logger.warning(
                "%s gives %d tokens to calibrate on, not %d × %d.", self.dataset, tokens, self.samples, length
            )
        return chosen


def read_calibration(dataset: str, samples: int, length: int, seed: int) -> CalibrationText:
    """Texts of a local ``.txt``/``.jsonl`` file, or of the first rows of a dataset on the Hub.

    Raises:
        QALoraError: numbers that make no sequence, no such text, or none in it.
    """
    for name, value, least in (("samples", samples, 1), ("length", length, 2)):
        if type(value) is not int or value < least:
            raise QALoraError(f"{name} is {value!r}, expected {least} or more.")
    texts = read_texts(dataset) if is_text_file(dataset) else _hub_texts(dataset, 8 * samples)
    return CalibrationText(dataset, texts, samples, length, seed)


def _hub_texts(name: str, rows: int) -> list[str]:
    try:
        from datasets import load_dataset

        return [joined_text(row) for row in load_dataset(name, split="train", streaming=True).take(rows)]
    except Exception as error:  # whatever datasets, the Hub and the network raise, between two rows, too
        raise QALoraError(
            f"{name!r} is neither a local .txt/.jsonl file nor a dataset that can be had from the Hub: {error}. Pass "
            "one of these, or try again."
        ) from error
