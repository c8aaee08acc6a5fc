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
