"""Tables of facts on a terminal, which shows what files say and never obeys it."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qalora_plugin.core.errors import printable


def print_facts(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows of plain text: no markup, no control characters."""
    table = Table(title=Text(printable(title)), show_header=False)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


def print_table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print rows of plain text under a header; all but the first column right-aligned."""
    table = Table(title=Text(printable(title)), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(Text(printable(name)), justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)
