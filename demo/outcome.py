"""The end of the demo: one table of what the stages found, and the same as JSON."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

MEGABYTE = 1e6
SMOLLM2 = "SmolLM2-135M-Instruct, its channels reordered: off the 4-bit grid of its GGUF, so that GPTQ has to round"
PRETRAINED = "a small Llama, pretrained here"


def device() -> str:
    """What the demo runs on, in words."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def collect(run: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Everything worth knowing of a finished run, read from what its stages wrote."""
    return {
        "device": device(),
        "model": SMOLLM2 if (run / "wheel").exists() else PRETRAINED,
        "heldout_loss": json.loads((run / "losses.json").read_text()),
        "bytes": {
            "model": _weights(run / "model"),
            "base": _weights(run / "base"),
            "merged_extra": _weights(run / "tuned" / "merged", "offsets*.safetensors"),
        },
        "verify": json.loads((run / "verified.json").read_text()),
        "before": json.loads((run / "before.json").read_text()),
        "after": json.loads((run / "after.json").read_text()),
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
    }


def _weights(folder: Path, pattern: str = "*.safetensors") -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def check(report: dict[str, Any]) -> list[str]:
    """What a run must show; returns what it does not."""
    loss, before, after = (report[key] for key in ("heldout_loss", "before", "after"))
    expected = {
        "fine-tuning lowers the held-out loss": loss["merged"] < loss["base"],
        "merged and base + adapter have the same loss to 4 decimals": abs(loss["merged"] - loss["adapter"]) < 5e-5,
        "`qalora verify` passes": report["verify"]["passed"],
        "served by vLLM, it documents in the house style": after["right"]["style"] > before["right"]["style"],
    }
    return [claim for claim, holds in expected.items() if not holds]


def show(report: dict[str, Any], console: Console) -> None:
    loss, size, proof, before, after = (report[key] for key in ("heldout_loss", "bytes", "verify", "before", "after"))
    table = Table(title=f"QA-LoRA, end to end ({report['device']})", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row("[bold]model[/]", report["model"])
    _section(
        table, ("held-out loss of the task", "nats a token of the answer"),
        ("16-bit model, before tuning", f"{loss['model']:.4f}"),
        ("INT4 base, before tuning", f"{loss['base']:.4f}"),
        ("INT4 base + adapter", f"{loss['adapter']:.4f}"),
        ("INT4 merged", f"[bold green]{loss['merged']:.4f}[/]"),
    )  # fmt: skip
    names = {"style": "in the house style", "Takes": "Takes right", "Gives": "Gives right", "Raises": "Raises right"}
    _section(
        table, (f"{after['asked']} held-out functions, asked", "before → after"),
        *((title, f"{before['right'][key]} → [bold green]{after['right'][key]}[/]") for key, title in names.items()),
    )  # fmt: skip
    _section(
        table, ("size of the weights", "MB"),
        ("16-bit model", f"{size['model'] / MEGABYTE:.1f}"),
        ("INT4 base (embeddings stay 16-bit)", f"{size['base'] / MEGABYTE:.1f}"),
        ("merged, beyond the base's own files", f"{size['merged_extra'] / MEGABYTE:.1f}"),
    )  # fmt: skip
    _section(
        table, ("merged = base + adapter", "[green]verified[/]" if proof["passed"] else "[red]NOT verified[/]"),
        ("tensors of the base, byte-identical", f"{proof['tensors_identical']} of {proof['tensors']}"),
        ("error of the weights", f"{proof['weight_error_relative']:.1e} of the adapter's part"),
        ("largest relative difference of a logit", f"{proof['logit_difference']:.1e} in {proof['dtype']}"),
        ("same most likely token", f"{proof['top1_agreement']:.2%} of {proof['tokens']}"),
        ("vLLM against transformers, log p", f"{after['logprob_difference']:.3f} at most"),
    )  # fmt: skip
    _section(table, ("time", "s"), *((name, f"{seconds:.0f}") for name, seconds in report["seconds"].items()))
    console.print(table)

    console.print(after["question"], style="dim", markup=False, highlight=False)
    answers = Table(title="answered by vLLM", title_justify="left", expand=True)
    answers.add_column("before: the INT4 base", ratio=1)
    answers.add_column("after: the merged folder, still INT4", ratio=1)
    answers.add_row(*(Text(one["answer"] + (" …" if one["cut_short"] else "")) for one in (before, after)))
    console.print(answers)


def _section(table: Table, head: tuple[str, str], *rows: tuple[str, str]) -> None:
    table.add_section()
    table.add_row(f"[bold]{head[0]}[/]", head[1])
    for name, value in rows:
        table.add_row(f"  {name}", value)
