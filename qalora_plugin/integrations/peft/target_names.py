"""Names in an adapter's config, held against those in the model. On disk linears may be named otherwise, above all
experts: there each is a linear, in the model all of a layer are one module a projection. A name that the disk alone
knows would be passed over without a word, and what it was to train, or to leave alone, would not or would.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from qalora_plugin.checkpoint.patterns import matching_pattern
from qalora_plugin.core.errors import QALoraError, printable

_AN_EXPERT = re.compile(r"experts?(\.|_|$)|(^|\.)w\d+$")
_INSTEAD = ("one pattern instead of a list", "a pattern")
logger = logging.getLogger(__name__)
FIELDS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


class LinearNames:
    """Of the packed linears of a model.

    Args:
        stored: names in the model → names on disk, one, or those of all experts.
        modules: names of all modules of the model.
    """

    def __init__(self, stored: dict[str, list[str]], modules: Iterable[str]):
        self.stored = stored
        holders = {name[:end] for name in stored for end, letter in enumerate(name) if letter == "."}
        self._known = {name for name in modules if name not in holders} | stored.keys()

    def as_in_model(self, wanted: Any) -> Any:
        """Names, or a dict by names, with names on disk (``w1``, ``experts.w1``) taken for those in the model."""
        if not wanted or isinstance(wanted, str):
            return wanted
        if isinstance(wanted, dict):
            return {name: value for given, value in wanted.items() for name in self._of(given)}
        return type(wanted)(name for given in wanted for name in self._of(given))

    def _of(self, given: str) -> list[str]:
        if any(_ends(name, given) for name in self._known):
            return [given]
        parts, found = given.count(".") + 1, set()
        for name, on_disk in self.stored.items():
            parent, _, leaf = on_disk[0].rpartition(".")
            shared = f"{parent.rpartition('.')[0]}.{leaf}" if len(on_disk) > 1 else on_disk[0]
            if shared == given:
                found.add(name)
            elif _ends(shared, given):
                found.add(".".join(name.split(".")[-parts:]))
        return sorted(found) or [given]

    def check(self, config: dict[str, Any], prefix: str = "") -> None:
        """Refuse patterns that only names on disk match and, where there are experts, names of nothing; warn of those
        of nothing else.

        Args:
            config: with :data:`FIELDS`, named as in the model where :meth:`as_in_model` can. prefix: of these fields.

        Raises:
            QALoraError: names the field, the pattern, and what it is in the model.
        """
        for field in FIELDS:
            given = config.get(field) or ()
            if given == "all-linear":
                continue
            for pattern in [given] if isinstance(given, str) else given:
                matches = _matcher(field, isinstance(given, str))
                self._require_more_than_on_disk(f"{prefix}{field}", pattern, matches)
                if field.endswith("_pattern") and not any(matches(pattern, name) for name in self.stored):
                    self._refuse_unless_dense(f"{prefix}{field}", pattern)
                elif field in FIELDS[:2] and not isinstance(given, str):
                    self._require_known(f"{prefix}{field}", pattern)

    def _require_more_than_on_disk(self, field: str, pattern: str, matches: Callable[[str, str], Any]) -> None:
        for name, on_disk in self.stored.items():
            other = next((other for other in on_disk if other != name and matches(pattern, other)), None)
            if other and not matches(pattern, name):
                together = f", together with the other {len(on_disk) - 1} experts" if len(on_disk) > 1 else ""
                raise QALoraError(
                    f"{field}: {printable(pattern)} is for {other} on disk, which is {name} in the model{together}, "
                    f"and would be passed over. Name {name.rpartition('.')[2]}, or the whole name in the model."
                )

    def _require_known(self, field: str, name: str) -> None:
        """An unknown name that means an expert, or is misspelt, is refused where there are experts; others, as in lists
        for many models, are a warning's matter."""
        if any(_ends(known, name) for known in self._known):
            return
        if _AN_EXPERT.search(name) or difflib.get_close_matches(name.rpartition(".")[2], self._leaves, 1, 0.8):
            self._refuse_unless_dense(field, name)
        elif field.endswith(FIELDS[1]):
            logger.warning(
                "%s: %s is no linear of this base and excludes nothing. For a part of the model give one pattern "
                "instead of a list: '.*%s.*'",
                field, printable(name), re.escape(name),
            )  # fmt: skip

    def _refuse_unless_dense(self, field: str, pattern: str) -> None:
        """Refuse a name of nothing where there are experts, of which names are easily mistaken; else warn."""
        if all(len(names) == 1 for names in self.stored.values()):
            logger.warning("%s: %s matches no quantised linear of this base", field, printable(pattern))
            return
        raise QALoraError(
            f"{field}: no linear of this base is named {printable(pattern)}. Quantised are: {', '.join(self._leaves)}. "
            f"Name some of these; for parts of the model, as its experts, give {_INSTEAD[field.endswith('_pattern')]}: "
            "'.*experts.*'."
        )

    @property
    def _leaves(self) -> list[str]:
        return sorted({name.rpartition(".")[2] for name in self.stored})


def _ends(name: str, given: str) -> bool:
    return name == given or name.endswith(f".{given}")


def _matcher(field: str, is_pattern: bool) -> Callable[[str, str], Any]:
    """PEFT's rule for a field: whether a pattern of it matches a name."""
    if field.endswith("_pattern"):
        return lambda pattern, name: matching_pattern([pattern], name) is not None
    if not is_pattern:
        return lambda pattern, name: _ends(name, pattern)
    return re.fullmatch
