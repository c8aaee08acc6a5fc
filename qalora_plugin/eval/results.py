"""What was measured: one row a model and a set of data, as a table, CSV, JSON and a plot."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qalora_plugin.checkpoint.atomic import new_file
from qalora_plugin.checkpoint.json_files import strict_json
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line, printable
from qalora_plugin.eval.tables import print_table


@dataclass(frozen=True)
class Result:
    """One model on one set of data. None: not measured.

    Attributes:
        kind: of model: ``dense``, ``base``, ``merged``, ``base + adapter``.
        size: bytes on disk. served_bits: a weight of the linears, all included.
        tokens: those that count. loss, perplexity, top1: means over them. kl: KL(reference ‖ model), nats a token.
        answered: rows that were answered. exact: share of right results, with reasoning. exact_direct: without.
        unfinished: answers with reasoning that reached the most tokens.
        metric, score, stderr: of a task of lm_eval.
    """

    model: str
    kind: str
    data: str
    size: int
    served_bits: float | None
    tokens: int | None = None
    loss: float | None = None
    perplexity: float | None = None
    top1: float | None = None
    kl: float | None = None
    kl_tokens: int | None = None
    answered: int | None = None
    exact: float | None = None
    exact_direct: float | None = None
    unfinished: int | None = None
    metric: str | None = None
    score: float | None = None
    stderr: float | None = None
    seconds: float | None = None


_COLUMNS: dict[str, tuple[str, str]] = {  # field → header, format; shown where any row has it
    "tokens": ("tokens", "d"),
    "loss": ("loss", ".4f"),
    "perplexity": ("ppl", ".2f"),
    "top1": ("top-1", ".2%"),
    "kl": ("KL", ".5f"),
    "answered": ("answers", "d"),
    "exact": ("reasoned", ".1%"),
    "exact_direct": ("direct", ".1%"),
    "unfinished": ("unfinished", "d"),
    "score": ("score", ".4f"),
    "stderr": ("±", ".4f"),
}
_TABLES = (  # the first column of each goes into the title, where it is the same for all
    ("tokens", "loss", "perplexity", "top1", "kl"),
    ("answered", "exact", "exact_direct", "unfinished"),
    ("metric", "score", "stderr"),
)


def show(results: Sequence[Result]) -> None:
    """Print a table for each set of data and kind of figure; what was not measured is left out."""
    for data, metric in dict.fromkeys((result.data, result.metric) for result in results):
        rows = [result for result in results if (result.data, result.metric) == (data, metric)]
        for first, *others in _TABLES:
            there = [name for name in (first, *others) if any(getattr(row, name) is not None for row in rows)]
            if not there:
                continue
            values = {getattr(row, first) for row in rows}
            title = f"qalora eval: {data}, {metric or ''}"
            if first in _COLUMNS and len(values) == 1:
                title = f"qalora eval: {data}, {values.pop()} {_COLUMNS[first][0]}"
                there.remove(first)
            columns = [name for name in there if name in _COLUMNS]
            headers = ["model", "MB", "bits", *(_COLUMNS[name][0] for name in columns)]
            print_table(title.strip(", "), headers, [_cells(row, columns) for row in rows])


def _cells(result: Result, columns: Iterable[str]) -> list[str]:
    cells = [result.model, f"{result.size / 1e6:.1f}", _formatted(result.served_bits, ".3f")]
    return cells + [_formatted(getattr(result, name), _COLUMNS[name][1]) for name in columns]


def _formatted(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def as_json(results: Sequence[Result], settings: dict[str, Any]) -> str:
    """``{"settings": …, "results": […]}``."""
    return strict_json({"settings": settings, "results": [asdict(result) for result in results]})


@os_errors_in_one_line()
def append_csv(path: Path, result: Result) -> None:
    """Add a row, under a header if the file is new: a run that is cut off keeps what it measured."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        if is_new:
            writer.writeheader()
        writer.writerow(asdict(result))


def require_plotting() -> None:
    """Refuse to begin what could not be drawn in the end."""
    if not find_spec("matplotlib"):
        raise QALoraError("--png needs matplotlib, which is not installed here: pip install 'qalora[eval]'")


def plot(results: Sequence[Result], path: Path) -> None:
    """Loss against served bits, a panel for each set of data, a point for each model.

    Raises:
        QALoraError: ``path`` exists, or no result has a loss.
    """
    drawn = [result for result in results if result.loss is not None and result.served_bits is not None]
    if not drawn:
        raise QALoraError("there is nothing to draw: no loss was measured. Pass --text or --jsonl.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names, models = (list(dict.fromkeys(getattr(result, key) for result in drawn)) for key in ("data", "model"))
    figure = Figure(figsize=(1.5 + 5 * len(names), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for result in (result for result in drawn if result.data == name):
            panel.plot(result.served_bits, result.loss, "o", color=_color(models.index(result.model)))
        panel.set(title=_shown(name), xlabel="served bits a weight", ylabel="loss, nats a token")
        panel.margins(0.15)
        panel.grid(alpha=0.3)
    marks = [Line2D([], [], marker="o", ls="", color=_color(i), label=_shown(name)) for i, name in enumerate(models)]
    figure.legend(handles=marks, loc="outside lower center", fontsize=8)
    with new_file(path) as work:
        figure.savefig(work, dpi=150, format="png")


def _color(number: int) -> tuple[float, float, float, float]:
    """One of twenty: ten strong ones first."""
    from matplotlib import colormaps

    return colormaps["tab20"]((*range(0, 20, 2), *range(1, 20, 2))[number % 20])


def _shown(text: str) -> str:
    """As matplotlib shows it and does not read it as a formula."""
    return printable(text).replace("$", r"\$")
