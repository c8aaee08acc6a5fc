"""Stage 1: text that every machine with Python has. The standard library's sources, and a task made from them.

    pretrain.jsonl, heldout.jsonl    {"text": a module's source}: to pretrain on (and calibrate), and to check on
    tokenizer/                       byte-level BPE, trained on the pretraining text
    train.jsonl, test.jsonl          the task, signature → first line of the docstring, as Axolotl's `input_output`

Whole modules are held out, chosen by a hash of their path. A test example whose summary occurs anywhere in the
pretraining text is dropped: what is measured has not been seen by the base, by the calibration or by the adapter.
"""

import argparse
import ast
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SKIPPED = {
    "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip",
    "site-packages", "dist-packages",
}  # fmt: skip
HELD_OUT = 10  # one module in so many
VOCABULARY = 4096
LONGEST = 64  # tokens of a task example; Axolotl pads batches to multiples of 64
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def sources() -> dict[str, str]:
    """Dotted module name → source, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED & set(parts) and not any(part.startswith("config-") for part in parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            found[".".join(parts).removesuffix(".__init__")] = text
    return found


def is_held_out(module: str) -> bool:
    return zlib.crc32(module.encode()) % HELD_OUT == 0


def summaries(module: str, source: str) -> Iterator[tuple[str, str]]:
    """``json.dumps(obj, *, indent=None)``, ``Serialize obj to a JSON formatted str.`` for every documented function."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}.{child.name}")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                summary = (ast.get_docstring(child) or "").partition("\n")[0].strip()
                signature = f"{prefix}.{child.name}({ast.unparse(child.args)})"
                if re.fullmatch(r"[ -~]{10,}\.", summary):
                    yield signature, summary

    yield from walk(ast.parse(source), module)


def example(signature: str, summary: str) -> dict:
    """One row for Axolotl's ``type: input_output``: only the segment labelled true is trained on."""
    prompt, completion = f"{BOS}Function: {signature}\nSummary:", f" {summary}{EOS}"
    return {"segments": [{"label": False, "text": prompt}, {"label": True, "text": completion}]}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def short_examples(pairs: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> list[dict]:
    examples = [example(*pair) for pair in pairs.items()]
    texts = ["".join(segment["text"] for segment in row["segments"]) for row in examples]
    lengths = map(len, tokenizer(texts, add_special_tokens=False).input_ids)
    return [row for row, length in zip(examples, lengths, strict=True) if length <= LONGEST]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(out: Path) -> None:
    modules = sources()
    held_out = {name: text for name, text in modules.items() if is_held_out(name)}
    seen = {name: text for name, text in modules.items() if name not in held_out}
    seen_text = "\n".join(seen.values())
    train = dict(pair for name, text in seen.items() for pair in summaries(name, text))
    test = dict(pair for name, text in held_out.items() for pair in summaries(name, text))
    test = {signature: summary for signature, summary in test.items() if summary not in seen_text}

    out.mkdir(parents=True)
    tokenizer = train_tokenizer(list(seen.values()))
    train_rows, test_rows = (short_examples(pairs, tokenizer) for pairs in (train, test))
    tokenizer.save_pretrained(out / "tokenizer")
    write_lines(out / "pretrain.jsonl", [{"text": text} for text in seen.values()])
    write_lines(out / "heldout.jsonl", [{"text": text} for text in held_out.values()])
    write_lines(out / "train.jsonl", train_rows)
    write_lines(out / "test.jsonl", test_rows)
    print(
        f"{len(seen)} modules, {len(seen_text) / 1e6:.1f} MB to pretrain on, {len(held_out)} held out; "
        f"{len(train_rows)} examples to train on, {len(test_rows)} to test"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="new folder")
    main(parser.parse_args().out)
