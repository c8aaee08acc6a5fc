"""Rows of a task in batches, as the Trainer takes them: the same for every method and seed."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qalora_plugin.eval.examples import Example, as_examples, read_rows

IGNORED = -100
_SORTED = 8  # batches that are sorted by length together, so that little is padded
_MULTIPLE = 32  # of which lengths are multiples


def read(path: Path, tokenizer, longest: int) -> list[Example]:
    """Rows of at most ``longest`` tokens."""
    return as_examples(read_rows(path), tokenizer, longest)[0]


def prose(path: Path, tokenizer, length: int = 256) -> list[Example]:
    """A text in pieces of ``length`` tokens."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    return [Example(ids[start : start + length]) for start in range(0, len(ids) - length, length)]


def batches(examples: Sequence[Example], size: int, count: int, seed: int) -> list[list[Example]]:
    """``count`` batches of ``size`` rows, every row once before any is seen again."""
    order, found = random.Random(seed), []
    whole = len(examples) // size * size
    while len(found) < count:
        shuffled = order.sample(examples, len(examples))[:whole]
        for start in range(0, whole, size * _SORTED):
            part = sorted(shuffled[start : start + size * _SORTED], key=lambda example: len(example.ids))
            chunks = [part[i : i + size] for i in range(0, len(part), size)]
            found += order.sample(chunks, len(chunks))
    return found[:count]


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Padded on the right; only answers count."""
    length = -(-max(len(example.ids) for example in examples) // _MULTIPLE) * _MULTIPLE
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for i, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, example.start : len(tokens)] = tokens[example.start :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
