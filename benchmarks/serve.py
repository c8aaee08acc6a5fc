"""Does a merged model serve as fast as its GPTQ base in stock vLLM?

    python benchmarks/serve.py                    a 50 M-parameter Llama on a CPU, a 7B-shaped one with CUDA
    python benchmarks/serve.py --size 8b --group-size 128 --variants stock,merged:kernel+offsets,lora

One run, each model in a process of its own with vLLM's defaults (compiled), on the same shapes:

    stock             the symmetric GPTQ base, vLLM's own quantization
    merged:<path>     the base merged by this project, on every serving path that the machine has
    lora              the base and an unmerged LoRA of rank 16 (--enable-lora)
    dense             the 16-bit model

On a CPU all models are up at once and take turns within a round, so that what else the machine does hits all alike;
with CUDA one is up at a time. Medians over the rounds go to benchmarks/results; the table is ratios against the bars.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from report import RESULTS, print_table, verdict, write_csv
from serving_models import SHAPES, write_models

MERGED = ("merged:fused-zeros", "merged:kernel+offsets", "merged:dense")
BAR = 0.97 if torch.cuda.is_available() else 0.95
LOAD_BAR, LORA_BAR = 1.15, 1.5
LOADED = ("stock", "merged:fused-zeros", "merged:kernel+offsets")  # variants whose loading is timed


class Model:
    """A worker process that serves one variant; a context manager."""

    def __init__(self, variant: str, folder: Path, arguments: argparse.Namespace):
        kind, _, path = variant.partition(":")
        model = {"stock": "base", "lora": "base"}.get(kind, kind)
        worker = Path(__file__).with_name("serving_worker.py")
        self.command = [sys.executable, worker, folder / model, "--options", arguments.options]
        for name in ("prompt", "output"):
            self.command += [f"--{name}", getattr(arguments, name)]
        self.command += ["--most", max(arguments.concurrency)]
        if kind == "lora":
            self.command += ["--lora", folder / "lora"]
        self.environment = {**os.environ, "QALORA_PATH": path}
        self.log = (folder / f"{variant.replace(':', '-')}.log").open("w+")

    def __enter__(self) -> "Model":
        self.process = subprocess.Popen(
            [str(part) for part in self.command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, env=self.environment,
        )  # fmt: skip
        self._answer()
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()

    def order(self, do: str, **values: int) -> dict[str, float]:
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"the worker {self.command} ended:\n{self.log.read()[-4000:]}")
        return json.loads(line)


def measure(model: Model, variant: str, concurrency: list[int]) -> dict[tuple[str, int], list[dict]]:
    """One round of one variant; small numbers of requests several times over."""
    found = {(variant, c): [model.order("serve", concurrency=c) for _ in range(max(1, 4 // c))] for c in concurrency}
    if variant in LOADED:
        found[variant, 0] = [model.order("load")]
    return found


def run(arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, int], list[dict]]:
    """Every variant's samples, by variant and concurrency (0: loading)."""
    samples: dict[tuple[str, int], list[dict]] = {}

    def rounds(models: dict[str, Model]) -> None:
        for model in models.values():
            for c in arguments.concurrency:
                model.order("serve", concurrency=c)  # warms up
        for _ in range(arguments.rounds):
            for variant, model in models.items():
                for key, found in measure(model, variant, arguments.concurrency).items():
                    samples.setdefault(key, []).extend(found)

    together = [[v] for v in arguments.variants] if torch.cuda.is_available() else [arguments.variants]
    for group in together:
        with ExitStack() as stack:
            rounds({variant: stack.enter_context(Model(variant, folder, arguments)) for variant in group})
    return samples


def medians(samples: dict[tuple[str, int], list[dict]]) -> dict[tuple[str, int], dict[str, float]]:
    return {
        key: {name: statistics.median(sample[name] for sample in found) for name in found[0]}
        for key, found in samples.items()
    }


def report(found: dict[tuple[str, int], dict[str, float]], arguments: argparse.Namespace) -> None:
    header = ["variant", *(f"tokens/s at {c}" for c in arguments.concurrency), "÷ stock at each", "TTFT ms", "load s"]
    rows = []
    for variant in arguments.variants:
        speeds = [found[variant, c]["tokens_per_s"] for c in arguments.concurrency]
        stock = [found["stock", c]["tokens_per_s"] for c in arguments.concurrency]
        first = [f"{found[variant, c]['ttft_ms']:.3g}" for c in arguments.concurrency]
        load = found.get((variant, 0), {}).get("load_s", "")
        ratios = " ".join(f"{a / b:.3f}" for a, b in zip(speeds, stock, strict=True))
        rows.append([variant, *speeds, ratios, " ".join(first), load])
    print_table(header, rows)
    best = next((v for v in MERGED if v in arguments.variants), None)
    if best is None:
        return
    print(f"\n{best} against the bars:")
    for c in arguments.concurrency:
        speed = found[best, c]["tokens_per_s"]
        line = f"  concurrency {c}: ÷ stock {verdict(speed / found['stock', c]['tokens_per_s'], BAR, True)}"
        if "lora" in arguments.variants:
            ratio = speed / found["lora", c]["tokens_per_s"]
            at_bar = c == 32 and torch.cuda.is_available()
            line += f", ÷ LoRA {verdict(ratio, LORA_BAR, True) if at_bar else f'{ratio:.3f}'}"
        print(line)
    load = found[best, 0]["load_s"] / found["stock", 0]["load_s"]
    print(f"  loading ÷ stock {verdict(load, LOAD_BAR, False)}")


def main() -> None:
    cuda = torch.cuda.is_available()
    fuses = not cuda or torch.cuda.get_device_capability() == (9, 0)  # Hopper has Machete
    everything = ["stock", *MERGED[0 if fuses else 1 :], "lora", "dense"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="7b" if cuda else "50m")
    parser.add_argument("--group-size", type=int, default=64 if cuda else 32)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=everything)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512 if cuda else 32, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128 if cuda else 24, help="tokens of an answer")
    parser.add_argument("--options", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--results", type=Path, default=RESULTS / f"serve_{'cuda' if cuda else 'cpu'}.csv")
    arguments = parser.parse_args()
    if "stock" not in arguments.variants:
        parser.error("--variants needs stock: everything is compared with it")
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), arguments.size, arguments.group_size)
        found = medians(run(arguments, Path(folder)))
    report(found, arguments)
    same = {name: getattr(arguments, name) for name in ("size", "group_size", "prompt", "output", "rounds")}
    loads = {variant: values["load_s"] for (variant, c), values in found.items() if c == 0}
    rows = [
        {"variant": variant, "concurrency": c, **values, "load_s": loads.get(variant, ""), **same}
        for (variant, c), values in found.items()
        if c
    ]
    write_csv(arguments.results, rows, "vllm")


if __name__ == "__main__":
    main()
