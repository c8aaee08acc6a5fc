"""Rows of a task as token ids, in batches; and what a model loses on held-out ones."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

IGNORED = -100
_SORTED = 8  # batches that are sorted by length together, so that little is padded
_PADDED = 32  # lengths are multiples of this

Row = tuple[list[int], int]  # token ids; how many of them come before the answer


def read(path: Path, tokenizer, longest: int) -> list[Row]:
    """Rows of at most ``longest`` tokens: the question in the chat template, then the answer."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        prompt_ids, answer = tokenizer([prompt, messages[-1]["content"]], add_special_tokens=False).input_ids
        ids = [*prompt_ids, *answer, tokenizer.eos_token_id]
        if len(ids) <= longest:
            rows.append((ids, len(prompt_ids)))
    return rows


def batches(rows: Sequence[Row], size: int, count: int, seed: int) -> list[list[Row]]:
    """``count`` batches of ``size`` rows, every row once before any is seen again; the same for every method."""
    order, found = random.Random(seed), []
    while len(found) < count:
        shuffled = order.sample(rows, len(rows))
        whole = len(rows) // size * size
        for start in range(0, whole, size * _SORTED):
            part = sorted(shuffled[start : min(start + size * _SORTED, whole)], key=lambda row: len(row[0]))
            chunks = [part[i : i + size] for i in range(0, len(part), size)]
            found += order.sample(chunks, len(chunks))
    return found[:count]


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Padded on the right; only answers count."""
    length = -(-max(len(ids) for ids, _ in rows) // _PADDED) * _PADDED
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for i, (row, prompt) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        labels[i, prompt : len(row)] = ids[i, prompt : len(row)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prose(path: Path, tokenizer, length: int = 256) -> list[Row]:
    """A text in pieces of ``length`` tokens, of which all but the first count."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    return [(ids[start : start + length], 1) for start in range(0, len(ids) - length, length)]


@torch.inference_mode()
def loss(model: torch.nn.Module, rows: Sequence[Row], size: int = 16) -> float:
    """Mean cross entropy of an answer's token, in nats; products in float32."""
    model.eval()
    device = next(model.parameters()).device
    ordered, total, count = sorted(rows, key=lambda row: len(row[0])), 0.0, 0
    for start in range(0, len(ordered), size):
        batch = {name: tensor.to(device) for name, tensor in collate(ordered[start : start + size]).items()}
        targets = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        wanted = targets != IGNORED
        total += cross_entropy(logits[wanted].float(), targets[wanted], reduction="sum").item()
        count += int(wanted.sum())
    return total / count
