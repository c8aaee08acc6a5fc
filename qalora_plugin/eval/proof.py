"""After a merge: verify it, show the report, and write the figures into the card."""

import logging
from pathlib import Path
from typing import Any

from qalora_plugin.conversion.card import add_exactness
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.verifying import VerifyReport, verify

logger = logging.getLogger(__name__)


def prove(base: str | Path, adapter: str | Path, merged: Path, **options: Any) -> VerifyReport:
    """Verify a merge that was just made; a bar that is missed is a warning, for the adapter is safe.

    Args:
        options: as for :func:`.verifying.verify`.

    Raises:
        QALoraError: it does not hold the base's tensors.
    """
    report = verify(base, adapter, merged, **options)
    report.print()
    add_exactness(merged, report)
    if report.tensors_identical < report.tensors:
        raise QALoraError(f"{merged} does not hold the base's tensors. Merge {adapter} again.")
    for failure in report.failures:
        logger.warning("the merge is not what it should be: %s", failure)
    return report
