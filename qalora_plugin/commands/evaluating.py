"""`qalora eval`: what models have learned, kept and lost, beside what they take."""

from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from qalora_plugin.checkpoint.atomic import require_absent
from qalora_plugin.checkpoint.places import require_writable
from qalora_plugin.core.errors import QALoraError, printable
from qalora_plugin.eval.models import Subject, open_all
from qalora_plugin.eval.results import Result, append_csv, as_json, plot, require_plotting, show
from qalora_plugin.eval.running import Settings, measure, plan
from qalora_plugin.eval.tasks import Tasks

DTYPES = ("float32", "bfloat16", "float16")


def evaluate(
    models: list[str],
    adapters: list[str],
    texts: list[Path],
    sets: list[Path],
    settings: Settings,
    reference: str | None = None,
    tasks: str | None = None,
    tasks_path: Path | None = None,
    revision: str | None = None,
    csv: Path | None = None,
    png: Path | None = None,
    json: bool = False,
) -> list[Result]:
    """Measure models, show and write what was found; arguments as of the command.

    Raises:
        QALoraError: whatever is wrong with any of them, before the first model is loaded.
    """
    if settings.dtype not in DTYPES:
        raise QALoraError(f"--dtype is {settings.dtype!r}, expected {', '.join(DTYPES)}.")
    for out in (csv, png):
        if out is not None:
            require_absent(out)
    if png is not None:
        require_plotting()
        if not texts and not sets:
            raise QALoraError("--png draws losses. Pass --text FILE or --jsonl FILE.")
    if csv is not None and not csv.absolute().parent.is_dir():
        raise QALoraError(f"the folder {csv.absolute().parent} for --csv does not exist. Make it first.")
    for out, name in ((csv, "--csv"), (png, "--png")):
        if out is not None:
            require_writable(out.absolute(), name)
    if csv is not None and png is not None and csv.absolute() == png.absolute():
        raise QALoraError(f"--csv and --png are both {csv}. Give each a file of its own.")
    _require_device(settings.device)
    names = [name for part in (tasks or "").split(",") if (name := part.strip())]
    asked = Tasks(names, tasks_path, settings.rows) if names else None
    subjects = open_all(models, adapters, revision)
    opened = Subject.open(reference) if reference else None
    made = plan(subjects, texts, sets, settings, opened, asked)
    messages = Console(stderr=True, soft_wrap=True)
    for note in made.notes:
        messages.print(f"note: {printable(note)}", markup=False, highlight=False)
    results: list[Result] = []
    for found in measure(made, progress=not json and Console().is_terminal):
        results += found
        if csv is not None:
            append_csv(csv, found)
    if png is not None:
        plot(results, png)
    if json:
        print(as_json(results, asdict(settings) | {"reference": reference, "tasks": names, "torch": torch.__version__}))
    else:
        show(results)
    return results


def _require_device(device: str) -> None:
    """Refuse one that is not here, or that computes nothing (meta)."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise QALoraError(f"--device {device} cannot be used here: {str(error)[:120]}. Use another, as cpu.") from error
