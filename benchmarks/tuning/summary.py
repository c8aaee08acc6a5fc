"""The accuracy table: runs as CSV, their means over seeds as Markdown, loss against served bits as a plot."""

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from report import short
from transformers import AutoConfig
from tuning.jobs import HEALED, QUANTIZE, RANK, REQUANTIZE, TASKS, Job, job_of

from qalora_plugin.checkpoint.replacing import replace_text
from qalora_plugin.conversion.added import merged_spec
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.served_bits import served_bits

LABELS = {
    "16-bit": "16-bit model, untuned",
    "base": "INT base, untuned",
    "lora": "LoRA, 16-bit, not merged",
    "galore": "GaLore, 16-bit",
    "qlora": "QLoRA (NF4), not merged",
    REQUANTIZE: "LoRA → merge → GPTQ",
    "peft": "PEFT `use_qalora`, not merged",
    "offsets": "QA-LoRA (offsets)",
    "peqa": "PEQA (free step sizes)",
    "peqa-sampled": "PEQA, gradient of one token in four (trial)",
    "scale-units": "offsets and scales, gradient of all tokens (trial)",
    "weight-units": "offsets in weight units, scales × 3 (trial)",
    "alike": "offsets and scales, one token in four, taken alike (trial)",
    "in-eight": "offsets and scales, one token in eight (trial)",
    "scales": "**offsets and scales**",
    "scales-all-tokens": "the same, gradient of all tokens",
    "scales-calibrated": "**offsets and scales, calibrated start**",
    HEALED: "LoRA → merge → GPTQ → **offsets and scales**, half the steps each",
}
_TRIAL = "(trial)"
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # a byte for 64 weights, and a float32 for 256 of these bytes
COLUMNS = [
    "task", "method", "bits", "group_size", "clip", "gptaq", "rank", "lr", "seed", "loss", "top1", "prose",
    "bits_a_weight", "steps", "trained", "first_loss", "last_loss", "step_seconds", "train_seconds", "peak_mb",
    "machine", "torch", "transformers", "peft", "commit", "date", "note",
]  # fmt: skip
FOUND = ("loss", "top1", "prose")  # of which differences are of interest
TEXT = {"task", "method", "machine", "torch", "transformers", "peft", "commit", "date", "note"}


class Cell(NamedTuple):
    """Runs that differ in their seed alone."""

    job: Job
    losses: list[float]
    prose: list[float]
    bits: float  # served, a weight

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)


def linear_specs(model: Path, bits: int, group_size: int) -> list[GroupwiseSpec]:
    """Linears of one decoder layer of a Llama: all layers are alike."""
    config = AutoConfig.from_pretrained(model)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_key_value_heads * hidden // config.num_attention_heads
    sizes = [(hidden, hidden)] * 2 + [(hidden, heads)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]
    return [GroupwiseSpec("", k, n, bits, group_size) for k, n in sizes]


def bits_a_weight(job: Job, model: Path) -> float:
    """What the linears take where the result is served, all included."""
    specs = linear_specs(model, job.bits or 4, job.group_size or 32)
    weights = sum(spec.in_features * spec.out_features for spec in specs)
    lora = 16 * job.rank * sum(spec.in_features + spec.out_features for spec in specs) / weights
    if not job.bits:
        return {"qlora": NF4_BITS + lora, "lora": 16 + lora}.get(job.method, 16.0)
    if job.method in ("base", REQUANTIZE, "peqa", "peqa-sampled"):  # PEQA's scales take the place of the base's
        return served_bits(specs).bits_a_weight
    scales = job.method not in ("offsets", "peft")
    return served_bits(merged_spec(spec, job.rank, "float16", scales=scales) for spec in specs).bits_a_weight


def with_bits(rows: Iterable[dict], model: Path) -> list[dict]:
    """Rows of results, with the served bits that those of a CSV have already. ``model`` is opened where one has not."""
    return [
        row if row["method"] == QUANTIZE or "bits_a_weight" in row
        else {**row, "bits_a_weight": bits_a_weight(job_of(row), model)}
        for row in rows
    ]  # fmt: skip


def cells(rows: Iterable[dict]) -> list[Cell]:
    """Of every method and base the runs at the rate that does best."""
    found: dict[Job, Cell] = {}
    for row in rows:
        job = job_of(row)
        if job.method == QUANTIZE or "loss" not in row:
            continue
        one = found.setdefault(Job(**{**vars(job), "seed": 0}), Cell(job, [], [], row["bits_a_weight"]))
        one.losses.append(row["loss"])
        one.prose.append(row["prose"])
    best: dict[tuple, Cell] = {}
    for cell in found.values():
        key = (cell.job.task, cell.job.method, cell.job.base, cell.job.rank)
        if key not in best or (-len(cell.losses), cell.loss) < (-len(best[key].losses), best[key].loss):
            best[key] = cell
    return list(best.values())


def write_csv(rows: list[dict], out: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: job_of(row).name):
        if row["method"] != QUANTIZE:
            row = {"rank": job_of(row).rank, **row}
            writer.writerow({key: round(value, 4) if key in FOUND else short(value) for key, value in row.items()})
    replace_text(out, text.getvalue(), 0o644)


def read_csv(path: Path) -> list[dict]:
    """Rows that :func:`write_csv` wrote."""
    with path.open(newline="") as file:
        return [
            {name: value if name in TEXT else json.loads(value.lower()) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def _base_of(job: Job) -> tuple[int, int, bool, bool]:
    """What rows are in order of: the most bits first."""
    return -(job.bits or 16), job.group_size, job.clip, job.gptaq


def markdown(found: list[Cell]) -> str:
    """One table a task; differences are from LoRA on the 16-bit model."""
    lines = []
    for task in TASKS:
        here = [cell for cell in found if cell.job.task == task]
        if not here:
            continue
        limit = next((cell.loss for cell in here if cell.job.method == "lora"), None)
        lines += [f"**{task}**", "", "| base | method | loss | − LoRA's | seeds | prose | served bits |"]
        lines += ["|---|---|---|---|---|---|---|"]
        order = list(LABELS)
        here.sort(key=lambda cell: (*_base_of(cell.job), order.index(cell.job.method), -cell.job.rank))
        for cell in here:
            spread = f" ± {(max(cell.losses) - min(cell.losses)) / 2:.4f}" if len(cell.losses) > 1 else ""
            behind = "" if limit is None else f"{cell.loss - limit:+.4f}"
            made = (", clipped" if cell.job.clip else "") + (", GPTAQ" if cell.job.gptaq else "")
            base = f"{cell.job.bits} bit g {cell.job.group_size}{made}" if cell.job.bits else "16 bit"
            method = LABELS[cell.job.method] + (f", rank {cell.job.rank}" if cell.job.rank != RANK else "")
            lines.append(
                f"| {base} | {method} | {cell.loss:.4f}{spread} | {behind} | {len(cell.losses)} | "
                f"{statistics.mean(cell.prose):.3f} | {cell.bits:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def plot(found: list[Cell], out: Path) -> None:
    """Held-out loss against served bits, a panel a task, of all that was tuned and is served in INT; without trials."""
    import matplotlib.pyplot as plt

    found = [cell for cell in found if cell.job.lr and not LABELS[cell.job.method].endswith(_TRIAL)]
    tasks = [task for task in TASKS if any(cell.job.task == task for cell in found)]
    if not tasks:
        return
    figure, panels = plt.subplots(1, len(tasks), figsize=(9 * len(tasks), 4.5), squeeze=False)
    for task, panel in zip(tasks, panels[0], strict=True):
        lines: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
        for cell in found:
            if cell.job.task == task and cell.job.bits:
                lines[cell.job.method, cell.job.gptaq].append((cell.bits, cell.loss))
            elif cell.job.task == task and cell.job.method == "lora":
                panel.axhline(cell.loss, color="gray", linestyle=":", label=LABELS["lora"])
        methods = list(dict.fromkeys(method for method, _ in lines))
        for (method, gptaq), points in lines.items():
            label = LABELS[method].replace("*", "") + (", by GPTAQ" if gptaq else "")
            style = {"color": f"C{methods.index(method)}", "marker": "s" if gptaq else "o"}
            panel.plot(*zip(*sorted(points), strict=True), label=label, **style)
        panel.set(title=task, xlabel="bits a weight, served", ylabel="held-out loss, nats a token")
        panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(out, dpi=120)
