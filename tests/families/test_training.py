"""Every architecture of docs/architectures.md, through the whole line: what is documented happens."""

from pathlib import Path

import pytest
from families.document import documented
from families.training import NAMES, row


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str, tmp_path: Path):
    found, expected = row(name, tmp_path), documented("training")[name]
    assert (found[1], found[2], found[-1]) == (expected[1], expected[2], expected[-1])


def test_the_document_lists_what_is_tested():
    assert list(documented("training")) == NAMES
    assert sum(row[-1].startswith("works") for row in documented("training").values()) >= 45
