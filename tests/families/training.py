"""Rows of the training table: one architecture's whole line, or why it is refused."""

from pathlib import Path

from families.architectures import EXPERTS, QUANTIZED_EXPERTS, TEXT, VISION_LANGUAGE, build
from families.bases import make_base_of
from families.line import run_line

from qalora_plugin.core.errors import QALoraError

NAMES = [*TEXT, *VISION_LANGUAGE, *(name + EXPERTS for name in QUANTIZED_EXPERTS)]
COLUMNS = ("model type", "class", "linears: quantised · adapted", "base", "after a step", "merged", "outcome")


def row(name: str, work: Path) -> tuple[str, ...]:
    model = build(name.removesuffix(EXPERTS))
    base = make_base_of(model, work, quantize_experts=name.endswith(EXPERTS))
    try:
        found = run_line(base, work)
    except QALoraError as error:
        return (name, type(model).__name__, "", "", "", "", f"refused: {error}")
    leaves = ", ".join(sorted({linear.rsplit(".", 1)[-1] for linear in found.missing}))
    outcome = f"works, without an adapter on {leaves}" if leaves else "works"
    figures = (f"{figure:.0e}" for figure in (found.base, found.trained, found.merged))
    return (name, type(model).__name__, f"{found.quantized} · {found.adapted}", *figures, outcome)
