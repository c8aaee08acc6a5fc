"""`qalora eval`: what models have learned, kept and lost, beside what they take."""

from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from qalora_plugin.checkpoint.atomic import require_absent
from qalora_plugin.checkpoint.places import absolute, require_writable
from qalora_plugin.core.errors import QALoraError, printable
from qalora_plugin.eval.models import Subject, open_all
from qalora_plugin.eval.planning import Settings, plan, read_data
from qalora_plugin.eval.results import Result, append_csv, as_json, plot, require_plotting, show
from qalora_plugin.eval.running import measure
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
    names = [name for part in (tasks or "").split(",") if (name := part.strip())]
    if tasks is not None and not names:
        raise QALoraError(f"--tasks {tasks} names no task. Pass --tasks NAMES, a comma between them.")
    _require_use(settings, texts, sets, names, reference, tasks_path)
    if settings.dtype not in DTYPES:
        raise QALoraError(f"--dtype is {settings.dtype!r}, expected {', '.join(DTYPES)}.")
    csv, png = csv and absolute(csv), png and absolute(png)
    for out in (csv, png):
        if out is not None:
            require_absent(out)
    if png is not None:
        require_plotting()
        if not texts and not sets:
            raise QALoraError("--png draws losses. Pass --text FILE or --jsonl FILE.")
    if csv is not None and not csv.parent.is_dir():
        raise QALoraError(f"the folder {csv.parent} for --csv does not exist. Make it first.")
    for out, name in ((csv, "--csv"), (png, "--png")):
        if out is not None:
            require_writable(out, name)
    if csv is not None and csv == png:
        raise QALoraError(f"--csv and --png are both {csv}. Give each a file of its own.")
    _require_device(settings.device)
    data = read_data(texts, sets, settings)
    asked = Tasks(names, tasks_path, settings.rows) if names else None
    subjects = open_all(models, adapters, revision)
    opened = None if reference is None else Subject.open(reference)
    made = plan(subjects, data, settings, opened, asked)
    messages = Console(stderr=True, soft_wrap=True)
    for note in made.notes:
        messages.print(f"note: {printable(note)}", markup=False, highlight=False)
    results: list[Result] = []
    about = asdict(settings) | {"reference": reference, "tasks": names, "torch": torch.__version__}
    try:
        for found in measure(made, progress=not json and Console().is_terminal):
            results.append(found)
            if csv is not None:
                append_csv(csv, found)
    finally:  # where the second model fails, the first was measured all the same
        if results and json:
            print(as_json(results, about))
        elif results:
            show(results)
    if png is not None:
        plot(results, png)
    return results


def _require_use(
    settings: Settings,
    texts: list[Path],
    sets: list[Path],
    tasks: list[str],
    reference: str | None,
    tasks_path: Path | None,
) -> None:
    """Refuse an option that would change nothing, because what it is about was not asked for."""
    usual, generated, compared = Settings(), ("--generate ROWS", settings.generate), ("--reference MODEL", reference)
    data = ("--text FILE or --jsonl FILE", texts or sets)
    for option, is_given, (needed, is_there) in (
        ("--tasks-path", tasks_path is not None, ("--tasks NAMES", tasks)),
        ("--reference", reference is not None, data),
        ("--kl-tokens", settings.kl_tokens != usual.kl_tokens, compared),
        ("--rows", settings.rows is not None, ("--jsonl FILE or --tasks NAMES", sets or tasks)),
        ("--tokens", settings.tokens != usual.tokens, ("--text FILE", texts)),
        ("--length", settings.length != usual.length, ("--text FILE", texts)),
        ("--answer-pattern", settings.answer_pattern is not None, generated),
        ("--max-new-tokens", settings.max_new_tokens != usual.max_new_tokens, generated),
    ):
        if is_given and not is_there:
            raise QALoraError(f"{option} needs {needed}: it changes nothing without. Pass that too, or leave it out.")


def _require_device(device: str) -> None:
    """Refuse one that is not here, or that computes nothing (meta)."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise QALoraError(f"--device {device} cannot be used here: {str(error)[:120]}. Use another, as cpu.") from error
