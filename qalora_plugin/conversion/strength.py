"""How much an adapter changes each linear, as a picture for the merged model's card.

Two means over the weights of a linear: ``|α/R·(B·A)ᵀ| / scales``, what the offsets move a weight by in steps of its
grid, and ``|D·C|``, the part by which its steps change. Both from at most 16 groups of each linear, evenly spread (a
mean over thousands of columns is known from those to a few percent), so that a merge takes no longer for it.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.tensors import read_array
from qalora_plugin.core.errors import printable
from qalora_plugin.core.folding import fold_workers
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.qalora import SCALES

PICTURE_NAME = "adapter-strength.svg"
_SAMPLED = 16  # groups of a linear
_NUMBER = re.compile(r"\.(\d+)\.")
_CELL_WIDTH, _CELL_HEIGHT, _LETTER = 16, 18, 7  # pixels
_LIGHT, _DARK = np.array([255, 247, 236]), np.array([127, 39, 4])


@dataclass(frozen=True)
class Strength:
    """Of one linear: mean |offset| in steps; mean |D·C|, None where no scales were trained."""

    name: str
    offsets: float
    scales: float | None


def strengths(base: QuantizedCheckpoint, adapter: AdapterFolder) -> list[Strength]:
    """Of every adapted linear, in order; one a core is in memory."""
    with fold_workers() as workers:
        return list(workers.map(lambda name: _strength(base, adapter, name), adapter.modules))


def _strength(base: QuantizedCheckpoint, adapter: AdapterFolder, name: str) -> Strength:
    groups = np.unique(np.linspace(0, base.specs[name].groups - 1, _SAMPLED).round().astype(int))
    lora_a, lora_b = (factor.astype(np.float32) for factor in adapter.factors(name))
    in_steps = np.abs((adapter.scaling(name) * lora_a[:, groups]).T @ lora_b.T)
    if not adapter.has_scales:
        steps = np.abs(_sampled_scales(base, name, groups))
        in_steps = np.divide(in_steps, steps, out=np.zeros_like(in_steps), where=steps > 0)
    factors = adapter.scale_factors(name)
    changed = None if factors is None else float(np.abs(factors[0][groups] @ factors[1]).mean())
    return Strength(name, float(in_steps.mean()), changed)


def _sampled_scales(base: QuantizedCheckpoint, name: str, groups: np.ndarray) -> np.ndarray:
    """Rows of the scales that the base multiplies by, float32 ``[len(groups), N]``."""
    total = np.zeros((len(groups), base.specs[name].out_features), np.float32)
    for part in SCALES[: 1 + bool(base.specs[name].scales_delta_dtype)]:
        info = base.files.tensors[f"{name}.{part}"]
        width = (info.end - info.start) // info.shape[0]
        for row, group in enumerate(groups.tolist()):
            start = info.start + group * width
            one = replace(info, shape=info.shape[1:], start=start, end=start + width)
            total[row] += read_array(base.folder, one)
    return total


def picture(found: Sequence[Strength]) -> str:
    """An SVG: a row for each kind of linear, a column for each layer, a panel for offsets and one for scales.

    Experts of a layer are one cell, their mean. Numbers stand in the cells' titles, which a browser shows on hovering.
    """
    panels = [("mean |offset|, in steps of the grid", _grid(found, lambda one: one.offsets))]
    if any(one.scales is not None for one in found):
        panels.append(("mean |change of scales|, in parts of them", _grid(found, lambda one: one.scales or 0.0)))
    rows = list(panels[0][1])
    columns = sorted({layer for cells in panels[0][1].values() for layer in cells})
    left = 20 + _LETTER * max(map(len, rows))
    height = _CELL_HEIGHT * (len(rows) + 4)
    lines, top = [], 0
    for title, grid in panels:
        lines += _panel(title, grid, columns, left, top)
        top += height
    width = max(left + _CELL_WIDTH * len(columns) + 20, 460)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}" '
        'font-family="monospace" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


def _grid(found: Iterable[Strength], value: Callable[[Strength], float]) -> dict[str, dict[int, float]]:
    """Kind of linear → layer → mean."""
    cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in found:
        kind, layer = _place(one.name)
        cells[kind][layer].append(value(one))
    return {kind: {layer: float(np.mean(values)) for layer, values in row.items()} for kind, row in cells.items()}


def _place(name: str) -> tuple[str, int]:
    """``model.layers.3.mlp.experts.7.up_proj`` → ``mlp.experts.up_proj``, 3; what is in no layer is in layer 0."""
    match = _NUMBER.search(name)
    if match is None or len(match[1]) > 6:
        return name, 0
    tower = name[: match.start()].removesuffix("layers").strip(".")
    rest = _NUMBER.sub(".", name[match.end() - 1 :]).strip(".")
    return (rest if tower in ("model", "transformer", "") else f"{tower}.{rest}"), int(match[1])


def _panel(title: str, grid: dict[str, dict[int, float]], columns: list[int], left: int, top: int) -> list[str]:
    most = max(value for row in grid.values() for value in row.values())
    lines = [f'<text x="10" y="{top + 14}" font-size="13">{escape(title)}: 0 (light) to {most:.3g} (dark)</text>']
    every = 1 + len(columns) // 24
    for x, layer in enumerate(columns):
        if x % every == 0:
            middle = left + _CELL_WIDTH * x + _CELL_WIDTH // 2
            lines.append(f'<text x="{middle}" y="{top + 32}" text-anchor="middle" font-size="9">{layer}</text>')
    for y, (kind, row) in enumerate(grid.items()):
        at = top + _CELL_HEIGHT * (y + 2) + 2
        shown = escape(printable(kind))
        lines.append(f'<text x="{left - 6}" y="{at + 13}" text-anchor="end">{shown}</text>')
        for x, layer in enumerate(columns):
            if layer in row:
                lines.append(
                    f'<rect x="{left + _CELL_WIDTH * x}" y="{at}" width="{_CELL_WIDTH - 1}" '
                    f'height="{_CELL_HEIGHT - 1}" fill="{_color(row[layer], most)}">'
                    f"<title>{shown}, layer {layer}: {row[layer]:.4g}</title></rect>"
                )
    return lines


def _color(value: float, most: float) -> str:
    share = value / most if most else 0.0
    return "#" + "".join(f"{part:02x}" for part in (_LIGHT + share * (_DARK - _LIGHT)).round().astype(int))
