"""`make demo`: a model trained here from scratch → GPTQ INT4 → QA-LoRA in Axolotl → exact merge → vLLM. No download.

Everything is written under demo/run/. What is complete there is not done again, so a run that was cut off goes on.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import torch
from report import check, collect, device, show
from rich.console import Console
from rich.markup import escape
from stages import Runner, Stage, StageError

from qalora_plugin.kernels.dequant import emulates

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent
RUN = DEMO / "run"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait are several times slower on cores that are shared
}


def stages(train: Path, serve: Path) -> list[Stage]:
    """The demo's stages in their order.

    Args:
        train: ``bin`` of the environment with Axolotl. serve: of the one with GPTQModel and vLLM.
    """
    corpus, model, base, tuned = (RUN / name for name in ("corpus", "model", "base", "tuned"))
    merged, cores = tuned / "merged", str(os.cpu_count())
    python = train / "python"
    emulated = not torch.accelerator.is_available() and emulates(torch.bfloat16)
    precision = ["--bf16=False"] if emulated else []  # or fine-tuning would take hours instead of minutes
    return [
        Stage(
            "corpus", "Text and task from Python's own library", corpus,
            lambda out: [python, DEMO / "corpus.py", out], ROOT, ENVIRONMENT,
        ),
        Stage(
            "pretrain", "Pretrain a small Llama, 16-bit", model,
            lambda out: [python, DEMO / "pretrain.py", corpus, out], ROOT, ENVIRONMENT,
        ),
        Stage(
            "quantize", "Quantise it: GPTQ, 4 bit, group 32", base,
            lambda out: [
                serve / "qalora", "quantize", model, out, "--dataset", corpus / "pretrain.jsonl",
                "--bits", "4", "--group-size", "32", "--asym", "--samples", "128", "--length", "256",
            ],
            None, ENVIRONMENT,
        ),
        Stage(
            "finetune", "Fine-tune in Axolotl (adapter: qalora), merge", tuned,
            lambda out: [
                train / "accelerate", "launch", "--num_processes", "1", "-m", "axolotl.cli.train",
                DEMO / "qalora.yml", f"--output_dir={out}", *precision,
            ],
            ROOT, ENVIRONMENT | {"OMP_NUM_THREADS": cores},  # accelerate would use one core
        ),
        Stage(
            "evaluate", "Held-out loss of all four models", RUN / "losses.json",
            lambda out: [python, DEMO / "losses.py", corpus, model, base, tuned, merged, out], ROOT, ENVIRONMENT,
        ),
        Stage(
            "verify", "Verify that merged = base + adapter", RUN / "verified.json",
            lambda _: [train / "qalora", "verify", "--base", base, "--adapter", tuned, "--merged", merged, "--json"],
            ROOT, ENVIRONMENT, captured=True,
        ),
        Stage(
            "serve", "Serve the merged folder with vLLM", RUN / "served.json",
            lambda out: [python, DEMO / "serve.py", serve.parent, corpus, merged, out], ROOT, ENVIRONMENT,
        ),
    ]  # fmt: skip


def main(train: Path, serve: Path) -> int:
    console = Console()
    for program in (train / "bin" / "accelerate", serve / "bin" / "qalora"):
        if not program.exists():
            console.print(f"[red]{escape(str(program))} is missing.[/]")
            console.print("`make demo` makes both environments; `--help` shows how to name others.")
            return 1
    console.print(f"QA-LoRA demo on {device()}, everything in {escape(str(RUN))}")
    run = Runner(RUN, console)
    try:
        for stage in stages(train / "bin", serve / "bin"):
            run(stage)
    except StageError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 1
    except KeyboardInterrupt:
        console.print("stopped; the next run goes on from here")
        return 130
    report = collect(RUN, run.seconds)
    (RUN / "report.json").write_text(json.dumps(report, indent=2) + "\n")
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
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running stage is ended on the way out
    sys.exit(main(arguments.train.absolute(), arguments.serve.absolute()))
