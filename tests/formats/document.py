"""docs/formats.md: written from runs, and what the tests hold their own runs against.

PYTHONPATH=tests .venv/bin/python -m formats.document
"""

import sys
import tempfile
from pathlib import Path

from formats.cells import BITS, CASES, GROUP_SIZES, Case, Outcome, Sample, one_thread, outcome
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

g −1 is one group for all of K.
"""
NO_CELL = "–"


def cell(row: Row, sample: Sample) -> Outcome | None:
    """What one conversion does; None where the format has no such checkpoints."""
    return outcome(sample, row.convert) if row.exists(sample.case) else None


def section(row: Row, cells: dict[Case, Outcome | None]) -> str:
    """A table, and its refusals below it, numbered."""
    reasons = list(dict.fromkeys(one.refusal for one in cells.values() if one and one.refusal))
    lines = [f"## {row.title}: {row.what}", ""]
    lines += [
        "| bits | " + " | ".join(f"g {size}" for size in GROUP_SIZES) + " |",
        "|---" * (1 + len(GROUP_SIZES)) + "|",
    ]
    for bits in BITS:
        for act_order in (False, True):
            shown = [_shown(cells[Case(bits, size, act_order)], reasons) for size in GROUP_SIZES]
            lines.append("| " + " | ".join([f"{bits}{', act-order' if act_order else ''}", *shown]) + " |")
    lines += ["", *(f"{number}. {reason}." for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines).rstrip() + "\n"


def _shown(one: Outcome | None, reasons: list[str]) -> str:
    if one is None:
        return NO_CELL
    return f"refused ({reasons.index(one.refusal) + 1})" if one.refusal else str(one)


def documented(row: Row) -> dict[Case, str]:
    """The cells of a row as they stand in the document, refusals as ``refused: reason``."""
    _, _, rest = DOCUMENT.read_text().partition(f"## {row.title}: {row.what}\n")
    lines = rest.partition("\n## ")[0].splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    found = {}
    for line in (line for line in lines if line[:3].strip("| ").isdigit()):
        kind, *cells = (part.strip() for part in line.strip("|").split("|"))
        bits, _, order = kind.partition(", ")
        for size, text in zip(GROUP_SIZES, cells, strict=True):
            number = text.removeprefix("refused (").rstrip(")")
            text = f"refused: {reasons[number].rstrip('.')}" if text.startswith("refused") else text
            found[Case(int(bits), size, bool(order))] = text
    return found


def main() -> None:
    sections = {row.title + row.what: {} for row in ROWS}
    with tempfile.TemporaryDirectory() as work, one_thread():
        for case in CASES:
            sample = Sample(case, Path(work) / str(case))
            for row in ROWS:
                sections[row.title + row.what][case] = cell(row, sample)
            print(case, file=sys.stderr, flush=True)
    texts = [section(row, sections[row.title + row.what]) for row in ROWS]
    DOCUMENT.write_text("\n".join([HEADER, *texts]))


if __name__ == "__main__":
    main()
