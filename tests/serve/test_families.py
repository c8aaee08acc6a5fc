"""The architectures of docs/architectures.md that vLLM serves, or that are refused: what is documented happens."""

from pathlib import Path

import pytest
from families.document import documented
from families.serving import NAMES, row

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str, tmp_path: Path):
    found, expected = row(name, tmp_path), documented("serving")[name]
    assert (found[1], found[-1]) == (expected[1], expected[-1])


def test_the_document_lists_what_is_tested():
    assert list(documented("serving")) == NAMES
    assert sum(row[-1] == "works" for row in documented("serving").values()) >= 12
