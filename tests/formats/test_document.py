"""docs/formats.md, cell by cell: what it says is what a run does."""

import re

import pytest
from formats.cells import one_thread
from formats.document import NO_CELL, cell, documented
from formats.rows import ROWS

TOLERANCE = 1.5  # of figures with one digit


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The checkpoints of a case; cases come one after another, so only the last one's are kept."""
    made = {}

    def of(case):
        if case not in made:
            made.clear()
            made[case] = case.sample(tmp_path_factory.mktemp("case") / "it")
        return made[case]

    with one_thread():
        yield of


@pytest.mark.parametrize("case", list(dict.fromkeys(case for row in ROWS for case in row.cases)), ids=str)
def test_every_cell_of_a_case(sample, case):
    different = {}
    for row in (row for row in ROWS if case in row.cases):
        found, stated = cell(row, sample(case)), documented(row)[case]
        if found is None:
            same, shown = stated == NO_CELL, NO_CELL
        elif found.refusal:
            shown = f"refused: {found.refusal}"
            same = shown == stated
        else:
            shown = str(found)
            same = shown == stated or _close(shown, stated)
        if not same:
            different[f"{row.title}, {row.what}"] = (shown, stated)
    assert not different


def test_every_format_has_a_row():
    from qalora_plugin.commands import exporting, importing

    for app, direction in ((importing.app, "import"), (exporting.app, "export")):
        names = {command.name or command.callback.__name__ for command in app.registered_commands}
        assert names == {row.name for row in ROWS if row.direction == direction}


def _close(found: str, stated: str) -> bool:
    """Figures within the tolerance, and as many."""
    ours, theirs = ([float(figure) for figure in re.findall(r"(\S+) %", text)] for text in (found, stated))
    return len(ours) == len(theirs) > 0 and all(
        1 / TOLERANCE <= one / other <= TOLERANCE for one, other in zip(ours, theirs, strict=True)
    )
