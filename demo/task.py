"""Stage 1: the task, made from text that every machine with Python has: the standard library's own sources.

    calibration.jsonl        {"text": a module's source}: what GPTQ calibrates on
    train.jsonl, test.jsonl  {"messages": [user: a function, assistant: its documentation in the house style]}

The house style is four lines. The first is the author's own summary; the others follow from the code alone, so that a
program can tell whether an answer has them right (:func:`score`). Whole modules are held out, chosen by a hash of their
name, and of those the functions whose summary occurs nowhere in the others: no function that is tested was trained or
calibrated on. (The model may have met Python's library when it was pretrained; this style it has not.)
"""

import argparse
import ast
import json
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

SKIPPED = {
    "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "encodings", "pydoc_data", "ensurepip",
    "site-packages", "dist-packages",
}  # fmt: skip
HELD_OUT = 10  # one module in so many
LONGEST = 500  # characters of a function
TRAINED, TESTED = 480, 48  # functions
LABELS = ("What", "Takes", "Gives", "Raises")
NOTHING = "nothing"
LONGEST_ANSWER = 96  # tokens
# A function written for this demo, whose answers are shown.
SHOWN = """\
def split_bill(total, people, tip=0.1):
    if people < 1:
        raise ValueError('nobody to pay')
    return round(total * (1 + tip) / people, 2)"""


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


def question(code: str) -> list[dict[str, str]]:
    """What the model is asked about a function: it has to know the house style."""
    return [{"role": "user", "content": f"Document this function in our house style.\n\n```python\n{code}\n```"}]


def house_style(function: ast.FunctionDef | ast.AsyncFunctionDef, summary: str) -> str:
    """``What: …``, ``Takes: path, mode='r'``, ``Gives: a value``, ``Raises: ValueError``, a line each."""
    arguments = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(function.args))
    own = list(_own_nodes(function))
    raised = [
        node.exc.func if isinstance(node.exc, ast.Call) else node.exc for node in own if isinstance(node, ast.Raise)
    ]
    errors = [ast.unparse(error).rpartition(".")[2] for error in raised if error]
    if any(isinstance(node, (ast.Yield, ast.YieldFrom)) for node in own):
        gives = "an iterator"
    else:
        gives = "a value" if any(isinstance(node, ast.Return) and node.value for node in own) else NOTHING
    named = dict.fromkeys(error for error in errors if error[:1].isupper())
    lines = (summary, arguments or NOTHING, gives, ", ".join(named) or NOTHING)
    return "\n".join(f"{label}: {line}" for label, line in zip(LABELS, lines, strict=True))


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a function in their order, but not those of functions and classes inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield child
            yield from _own_nodes(child)


def score(answer: str, expected: str) -> dict[str, bool]:
    """Whether an answer has the four lines and no other, and which of those that follow from the code are right."""
    found, right = (text.strip().splitlines() for text in (answer, expected))
    styled = len(found) == len(LABELS) and all(
        line.startswith(f"{label}: ") for line, label in zip(found, LABELS, strict=True)
    )
    lines = {label: styled and found[i].strip() == right[i] for i, label in enumerate(LABELS) if i}
    return {"style": styled} | lines


def examples(source: str) -> Iterator[dict]:
    """A row of the task for every function of a module that has a one-line summary and is neither tiny nor long."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        summary = (ast.get_docstring(node) or "").partition("\n")[0].strip()
        if not re.fullmatch(r"[ -~]{10,100}\.", summary) or len(node.body) < 2:
            continue
        node.body = node.body[1:]  # without the docstring
        code = ast.unparse(node)
        if code.count("\n") > 1 and len(code) <= LONGEST:
            yield {"messages": [*question(code), {"role": "assistant", "content": house_style(node, summary)}]}


def summary(row: dict) -> str:
    """The author's words in an example."""
    return row["messages"][-1]["content"].partition("\n")[0].partition(": ")[2]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(out: Path) -> None:
    modules = sources()
    seen = {name: text for name, text in modules.items() if not is_held_out(name)}
    seen_text = "\n".join(seen.values())
    train = [row for text in seen.values() for row in examples(text)]
    held_out = [row for name, text in modules.items() if name not in seen for row in examples(text)]
    test = [row for row in held_out if summary(row) not in seen_text]
    for rows in (train, test):
        random.Random(0).shuffle(rows)
    out.mkdir(parents=True)
    write_lines(out / "calibration.jsonl", [{"text": text} for text in seen.values()])
    write_lines(out / "train.jsonl", train[:TRAINED])
    write_lines(out / "test.jsonl", test[:TESTED])
    print(f"{len(train)} functions in {len(seen)} modules to train on, {len(test)} in the others to test")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="new folder")
    main(parser.parse_args().out)
