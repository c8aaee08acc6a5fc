"""docs/formats.md: written from runs, and what the tests hold their own runs against.

PYTHONPATH=tests .venv/bin/python -m formats.document
"""

import sys
import tempfile
from itertools import groupby
from pathlib import Path

from formats.cells import Outcome, one_thread, outcome
from formats.rows import ROWS, Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"
HEADER = """# Formats: what goes in and out, and what is lost

Every cell is a conversion that was run on a one-layer model (K of 128 and 256), its result dequantized and compared in
float64; `tests/formats` runs each again. Written by `PYTHONPATH=tests .venv/bin/python -m formats.document`.

- **exact**: every weight is the same, but for float32's rounding (1e-6 of the weights in the Euclidean norm).
- **0.03 % · 2 %**: lossy. ‖w − w₀‖ as a share of the weights, and of what the adapter adds to them, which here moves a
  weight by 0.1 of a step (fine-tuning does).
- **refused**: with one line that says why, before anything is written.
- **–**: the format has no such checkpoints.

g −1 is one group for all of K. What a merged checkpoint itself is: [merging.md](merging.md).
"""
NO_CELL = "–"


def cell(row: Row, sample) -> Outcome | None:
    """What one conversion does; None where the format has no such checkpoints."""
    return outcome(sample, row.convert) if row.exists(sample.case) else None


def section(row: Row, cells: dict[object, Outcome | None]) -> str:
    """A table, and its refusals below it, numbered."""
    reasons = list(dict.fromkeys(one.refusal for one in cells.values() if one and one.refusal))
    columns = list(dict.fromkeys(case.column for case in row.cases))
    lines = [f"## {row.title}: {row.what}", "", _line("", *columns), _line(*["---"] * (1 + len(columns)))]
    for name, cases in groupby(row.cases, lambda case: case.line):
        lines.append(_line(name, *(_shown(cells[case], reasons) for case in cases)))
    lines += ["", *(f"{number}. {reason}." for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines).rstrip() + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(one: Outcome | None, reasons: list[str]) -> str:
    if one is None:
        return NO_CELL
    return f"refused ({reasons.index(one.refusal) + 1})" if one.refusal else str(one)


def documented(row: Row) -> dict[object, str]:
    """The cells of a row as they stand in the document, refusals as ``refused: reason``."""
    _, _, rest = DOCUMENT.read_text().partition(f"## {row.title}: {row.what}\n")
    lines = rest.partition("\n## ")[0].splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    table = [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    texts = [text for _, *cells in table[2:] for text in cells]
    for i, text in enumerate(texts):
        if text.startswith("refused"):
            texts[i] = f"refused: {reasons[text.removeprefix('refused (').rstrip(')')].rstrip('.')}"
    return dict(zip(row.cases, texts, strict=True))


def main() -> None:
    cells: list[dict] = [{} for _ in ROWS]
    with tempfile.TemporaryDirectory() as work, one_thread():
        for case in dict.fromkeys(case for row in ROWS for case in row.cases):
            sample = case.sample(Path(work) / str(case))
            for row, found in zip(ROWS, cells, strict=True):
                if case in row.cases:
                    found[case] = cell(row, sample)
            print(case, file=sys.stderr, flush=True)
    DOCUMENT.write_text("\n".join([HEADER, *map(section, ROWS, cells)]))


if __name__ == "__main__":
    main()
