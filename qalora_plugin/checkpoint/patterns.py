"""Patterns of module names in an adapter's config: PEFT's rules, and none that would keep a matcher busy for ever.

PEFT hands them to ``re``, which tries every way of dividing a name among the repetitions of a pattern: a few nested
ones take longer than anybody waits. So a pattern is accepted by an upper bound on what it can cost.
"""

import re
from collections.abc import Iterable
from math import comb
from re import _constants as op  # type: ignore[attr-defined]  # private, so typeshed has neither
from re import _parser as parser  # type: ignore[attr-defined]

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError

_LONGEST = 1000  # characters of a pattern
_DEAREST, _DEAREST_TOGETHER = 10**7, 5 * 10**8  # steps of ``re``: some tenths of a second, and seconds
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)
_ONE_CHARACTER = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)


def matching_pattern(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that matches the end of a module's name, from a dot on. (PEFT's rule, without its import.)"""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), None)


def check_patterns(patterns: Iterable[str], modules: list[str], what: str) -> None:
    """Refuse patterns that are no regular expressions, or that could take too long on the names of these modules."""
    longest, steps = max(map(len, modules), default=0), 0
    for pattern in patterns:
        try:
            repeats, ways = _cost(parser.parse(pattern)) if len(pattern) <= _LONGEST else (None, 0)
            re.compile(f"(?:{pattern})")  # as PEFT puts it inside another: no flags for the whole
        except (re.error, RecursionError, OverflowError) as error:
            raise QALoraError(f"{what} holds {short(pattern)}, which is no regular expression ({error}).") from error
        cost = None if repeats is None else ways * comb(longest + repeats + 1, repeats + 1)
        if cost is not None and cost <= _DEAREST:
            steps += cost * len(modules)
            if steps <= _DEAREST_TOGETHER:
                continue
        raise QALoraError(
            f"{what} holds {short(pattern)}, which could take for ever to match. Name the modules plainly: a few "
            "repetitions, none inside another."
        )


def _cost(tree: Iterable) -> tuple[int | None, int]:
    """Repetitions in a pattern and ways through its alternatives; None: what is repeated can be divided differently."""
    repeats, ways = 0, 1
    inner: int | None
    for code, argument in tree:
        if code in _ONE_CHARACTER or code is op.AT:
            continue
        if code in _REPEATS:
            shortest, longest = argument[2].getwidth()
            if _cost(argument[2]) != (0, 1) or not 0 < shortest == longest:
                return None, 0
            inner, factor = 1, 1
        elif code in (op.SUBPATTERN, op.ASSERT, op.ASSERT_NOT):
            inner, factor = _cost(argument[-1])
        elif code is op.BRANCH:
            parts = [_cost(part) for part in argument[1]]
            known = [found for found, _ in parts if found is not None]
            inner = max(known) if len(known) == len(parts) else None
            factor = sum(found for _, found in parts)
        else:  # back references and the like
            return None, 0
        if inner is None:
            return None, 0
        repeats, ways = repeats + inner, ways * factor
    return repeats, ways
