"""Stage 7: the held-out loss of the task for all four models: what the adapter learned, and that the merge keeps it.

Only the tokens of the answer count, in the model's chat template, as in training. Float32, so that differences are the
models' own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qalora_plugin import load_adapter, load_base

BATCH = 8


def tokenize(rows: Path, model: Path) -> list[tuple[list[int], int]]:
    """Token ids of every held-out example, and how many of them come before its answer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        prompt, answer = tokenizer([prompt, messages[-1]["content"]], add_special_tokens=False).input_ids
        examples.append(([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    return sorted(examples, key=lambda example: len(example[0]))


@torch.inference_mode()
def loss(model: PreTrainedModel, examples: list[tuple[list[int], int]]) -> float:
    """Mean cross entropy of an answer's token, in nats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    total, count = 0.0, 0
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in batch], device=device)
        targets = torch.full_like(ids, -100)
        for i, (row, prompt) in enumerate(batch):
            targets[i, prompt : len(row)] = ids[i, prompt : len(row)]
        logits = model(input_ids=ids).logits[:, :-1]  # padding is on the right, out of every token's sight
        total += cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


def main(rows: Path, model: Path, base: Path, adapter: Path, merged: Path, out: Path) -> None:
    examples = tokenize(rows, model)
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "model": lambda: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        "base": lambda: load_base(base, dtype=torch.float32),
        "adapter": lambda: load_adapter(load_base(base, dtype=torch.float32), adapter),
        "merged": lambda: AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32),
    }
    losses = {}
    for name, load in models.items():
        losses[name] = loss(load(), examples)
        print(f"{name}: held-out loss {losses[name]:.6f}", flush=True)
    out.write_text(json.dumps(losses, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, help="the held-out examples")
    for name in ("model", "base", "adapter", "merged"):
        parser.add_argument(name, type=Path)
    parser.add_argument("out", type=Path, help="new JSON file")
    main(**vars(parser.parse_args()))
