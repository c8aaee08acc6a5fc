"""What a conversion says of its result."""

from typing import Protocol

from qalora_plugin.core.errors import printable


class Result(Protocol):
    def summary(self) -> list[str]:
        """Lines for a terminal: where it is, what it holds, what was lost, what to do next."""


def print_summary(result: Result) -> None:
    for line in result.summary():
        print(printable(line))
