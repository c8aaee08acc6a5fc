"""`make demo-edge`: a GGUF file → a base → QA-LoRA in Axolotl → exact merge → vLLM, and back to GGUF → llama.cpp.

The same model as in `make demo`, but as its wheel has it: 4-bit already (Q4_1). Not one code is changed on the way, in
either direction, so what edge devices run is what was trained. Needs what `make demo` made under demo/run/smollm2.
"""

import argparse
import json
import signal
import sys
from pathlib import Path

from outcome import device
from rich.console import Console
from rich.markup import escape
from run import DEMO, ENVIRONMENT, ROOT, download, finetune, verify
from stages import Runner, Stage, to_the_end


def stages(run: Path, train: Path, serve: Path) -> list[Stage]:
    """In their order. run: the folder of `make demo`. train, serve: ``bin`` of the two environments."""
    file, base, tuned, out = (run / name for name in ("model.gguf", "gguf-base", "gguf-tuned", "merged.gguf"))
    test, merged, python = run / "task" / "test.jsonl", tuned / "merged", train / "python"
    wheel = next((run / "wheel").glob("*.whl"))
    return [
        Stage(
            "task", "Task and text from Python's own library", run / "task",
            lambda path: [python, DEMO / "task.py", path], ROOT, ENVIRONMENT,
        ),
        Stage(
            "unpack", "The GGUF file (Q4_1) out of its wheel", file,
            lambda path: [python, DEMO / "ask_llama_cpp.py", "--unpack", wheel, path], ROOT, ENVIRONMENT,
        ),
        Stage(
            "import", "qalora import gguf: a base, not one code changed", base,
            lambda path: [train / "qalora", "import", "gguf", file, path], ROOT, ENVIRONMENT,
        ),
        finetune("finetune-gguf", train, tuned, "--base_model=gguf-base"),
        verify("verify-gguf", train, base, tuned, run / "gguf-verified.json"),
        Stage(
            "vllm", "Serve the merged folder with vLLM and ask it", run / "gguf-vllm.json",
            lambda path: [serve / "python", DEMO / "ask.py", merged, test, path, "--compare"], ROOT, ENVIRONMENT,
        ),
        Stage(
            "export", "qalora export gguf", out,
            lambda path: [train / "qalora", "export", "gguf", merged, path, "--like", file], ROOT, ENVIRONMENT,
        ),
        Stage(
            "llama.cpp", "Ask llama.cpp the same", run / "gguf-llama-cpp.json",
            lambda path: [python, DEMO / "ask_llama_cpp.py", out, test, path], ROOT, ENVIRONMENT,
        ),
    ]  # fmt: skip


def show(run: Path, console: Console) -> bool:
    """Print what both servers said; returns whether each has learned the style, and both say much the same."""
    vllm, edge = (json.loads((run / f"gguf-{name}.json").read_text()) for name in ("vllm", "llama-cpp"))
    verified = json.loads((run / "gguf-verified.json").read_text())
    same = f"{verified['tensors_identical']} of {verified['tensors']} tensors identical"
    moved = f"rounding moved logits by ≤ {verified['logit_difference']:.2g}"
    console.print(f"\nverified: {verified['passed']}; {same}; {moved}", highlight=False)
    for name, found in (("vLLM", vllm), ("llama.cpp", edge)):
        right = " · ".join(f"{line} {count}" for line, count in found["right"].items())
        console.print(f"{name}, of {found['asked']} held-out functions: {right}", highlight=False)
        console.print(found["answer"], markup=False, highlight=False)
    half = min(vllm["asked"], edge["asked"]) / 2
    return verified["passed"] and min(vllm["right"]["style"], edge["right"]["style"]) > half


def main(train: Path, serve: Path) -> int:
    console, runs = Console(soft_wrap=True), DEMO / "run"
    console.print(f"GGUF there and back, on {device()}, everything in {escape(str(runs))}")
    run = Runner(runs / "smollm2", console)

    def work() -> None:
        run(download(run.folder, train / "bin"))
        for stage in stages(run.folder, train / "bin", serve / "bin"):
            run(stage)

    status = to_the_end(work, console)
    return status or (0 if show(run.folder, console) else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, default=ROOT / ".venv", help="environment with Axolotl (%(default)s)")
    parser.add_argument("--serve", type=Path, default=ROOT / ".venv-serve", help="environment with vLLM (%(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage is ended on the way out
    sys.exit(main(arguments.train.absolute(), arguments.serve.absolute()))
