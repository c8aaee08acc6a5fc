"""Tasks of lm-evaluation-harness on a loaded model."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qalora_plugin.core.errors import QALoraError


@dataclass(frozen=True)
class TaskScore:
    """A figure of a task, as lm_eval names it (``acc``, ``exact_match,strict-match`` …); ``stderr`` if it has one."""

    task: str
    metric: str
    value: float
    stderr: float | None


class Tasks:
    """Tasks that are known and whose harness is installed."""

    def __init__(self, names: Sequence[str], folder: Path | None = None, limit: int | None = None):
        """
        Args:
            folder: of further task files, as ``lm_eval --include_path``. limit: examples of each task.

        Raises:
            QALoraError: lm_eval is not installed, does not know a task, or cannot load its data.
        """
        if not find_spec("lm_eval"):
            raise QALoraError("--tasks needs lm_eval, which is not installed here: pip install 'qalora[eval]'")
        if folder is not None and not folder.is_dir():
            raise QALoraError(f"--tasks-path {folder} is no folder. Pass the folder of the task files.")
        from lm_eval.tasks import TaskManager, get_task_dict

        self.names, self.limit = list(names), limit
        self._manager = TaskManager(include_path=None if folder is None else str(folder))
        if unknown := [name for name in self.names if not self._manager.match_tasks([name])]:
            raise QALoraError(f"lm_eval knows no task {unknown[0]!r}. See its list: lm_eval ls tasks.")
        try:
            get_task_dict([*self.names], self._manager)  # now, not after an hour of other measuring
        except Exception as error:  # whatever it, datasets and the Hub raise
            raise QALoraError(f"lm_eval cannot load {', '.join(self.names)}: {error}") from error

    def scores(self, model: Any, tokenizer: Any, batch_size: int = 8) -> list[TaskScore]:
        """Run them on a model where it is.

        Raises:
            QALoraError: lm_eval cannot, for example because a task's data are neither here nor to be had.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(
                wrapped, tasks=self.names, limit=self.limit, task_manager=self._manager, log_samples=False
            )
        except Exception as error:  # whatever it, datasets and the Hub raise
            raise QALoraError(f"lm_eval failed on {', '.join(self.names)}: {error}") from error
        return [score for task, figures in found["results"].items() for score in _scores(task, figures)]


def _scores(task: str, figures: dict[str, Any]) -> list[TaskScore]:
    """lm_eval's ``"acc,none": 0.3, "acc_stderr,none": 0.01``."""
    scores = []
    for key, value in figures.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
            stderr = figures.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            scores.append(TaskScore(task, name, float(value), stderr if isinstance(stderr, float) else None))
    return scores
