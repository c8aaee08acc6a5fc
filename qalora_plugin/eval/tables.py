"""Tables of facts on a terminal, which shows what files say and never obeys it."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qalora_plugin.core.errors import printable

_BORDER = 3  # characters beside a column
_FIRST = 16  # characters that the first column has at least; it folds


def print_facts(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows of plain text: no markup, no control characters."""
    table = Table(title=Text(printable(title)), show_header=False)
    for row in rows:
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
    Console().print(table)


def print_table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print rows of plain text under a header; all but the first column right-aligned, and never cut: where a terminal
    is too narrow for them, lines are longer than it."""
    cells = [list(header), *(list(row) for row in rows)]
    table = Table(title=Text(printable(title)), title_justify="left")
    for i, name in enumerate(cells[0]):
        table.add_column(Text(printable(name)), justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for row in cells[1:]:
        table.add_row(*(Text(printable(cell)) for cell in row))
    figures = sum(max(map(len, column)) + _BORDER for column in list(zip(*cells, strict=True))[1:])
    Console(width=max(Console().width, figures + _BORDER + _FIRST)).print(table)
