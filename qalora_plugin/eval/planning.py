"""What is measured on what: data read and tokenized before any model is loaded, and everything that can be wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.examples import Example, Row, as_examples, read_rows
from qalora_plugin.eval.generation import Judge
from qalora_plugin.eval.models import Subject
from qalora_plugin.eval.tasks import Tasks
from qalora_plugin.eval.tokens import read_texts, require_ids, tokenize


@dataclass(frozen=True)
class Data:
    """A set of data: texts, or rows; with a judge where answers are to be generated for the first rows."""

    name: str
    texts: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    asked: tuple[Row, ...] = ()
    judge: Judge | None = None


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        length: tokens of a sequence that texts are cut into. tokens: most tokens of a text.
        rows: most rows of a set; None: all. kl_tokens: tokens that the divergence is measured over, of each set.
        generate: rows to answer. answer_pattern: see :class:`.Judge`.
    """

    dtype: str = "float32"
    device: str = "cpu"
    length: int = 512
    tokens: int = 1 << 16
    rows: int | None = None
    kl_tokens: int = 4096
    generate: int = 0
    max_new_tokens: int = 256
    answer_pattern: str | None = None


@dataclass
class Plan:
    """Everything that can be wrong was looked for.

    Attributes:
        examples: of every model (the reference among them, at the end) and set of data.
    """

    subjects: list[Subject]
    data: list[Data]
    settings: Settings
    reference: Subject | None = None
    tasks: Tasks | None = None
    examples: list[list[list[Example]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def everyone(self) -> list[Subject]:
        """All models, the reference at the end."""
        return [*self.subjects, *([self.reference] if self.reference else [])]

    @cached_property
    def longest(self) -> int | None:
        """Most tokens of a sequence that all models take, so that all are measured on the same; None: any."""
        return min((one.longest for one in self.everyone if one.longest is not None), default=None)

    @property
    def shortest(self) -> str:
        """The model that takes the fewest tokens."""
        return next((one.label for one in self.everyone if one.longest == self.longest), "")

    @property
    def length(self) -> int:
        """Tokens of the sequences that texts are cut into."""
        return min(self.settings.length, self.longest or self.settings.length)


def read_data(texts: Sequence[Path], sets: Sequence[Path], settings: Settings) -> list[Data]:
    """
    Args:
        texts: files as for ``read_texts``. sets: files of rows.

    Raises:
        QALoraError: data that cannot be read, or answers to be generated to mere text.
    """
    names = _names([*texts, *sets])
    data = [Data(name, texts=tuple(read_texts(path))) for name, path in zip(names, texts, strict=False)]
    data += [_data_set(name, path, settings) for name, path in zip(names[len(texts) :], sets, strict=True)]
    if settings.generate and not any(one.asked for one in data):
        raise QALoraError("--generate needs questions with answers. Pass them: --jsonl FILE.")
    return data


def plan(
    subjects: list[Subject],
    data: list[Data],
    settings: Settings,
    reference: Subject | None = None,
    tasks: Tasks | None = None,
) -> Plan:
    """Tokenize everything, before any model is loaded.

    Raises:
        QALoraError: nothing to measure, a model without a tokenizer, or a reference whose tokens are not a model's.
    """
    if not data and tasks is None:
        raise QALoraError("there is nothing to measure. Pass --text FILE, --jsonl FILE or --tasks NAMES.")
    made = Plan(subjects, data, settings, reference, tasks)
    if any(one.texts for one in data) and made.length < settings.length:
        made.notes.append(f"sequences of {made.length} tokens, not {settings.length}: {made.shortest} takes no more")
    for subject in made.everyone:
        made.examples.append([_examples(made, subject, one) for one in data])
        require_ids((one.ids for part in made.examples[-1] for one in part), subject.vocabulary, subject.label)
    if reference is not None:
        for subject, examples in zip(subjects, made.examples, strict=False):
            if examples != made.examples[-1]:
                raise QALoraError(
                    f"{subject.label} and the reference {reference.label} make other tokens of the same text: there is "
                    "no KL between them. Pass a reference with the same tokenizer and chat template."
                )
            if subject.vocabulary != reference.vocabulary:
                raise QALoraError(
                    f"{subject.label} gives {subject.vocabulary} logits a token, the reference {reference.label} "
                    f"{reference.vocabulary}: there is no KL between them. Pass one with the same vocabulary."
                )
    elif any(examples != made.examples[0] for examples in made.examples):
        made.notes.append("tokenizers or chat templates differ: losses a token of these models cannot be compared")
    return made


def _names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many folders before them as tell them apart.

    Raises:
        QALoraError: a file is there twice.
    """
    absolute = [path.absolute() for path in paths]
    if twice := [path for i, path in enumerate(absolute) if path in absolute[:i]]:
        raise QALoraError(f"{twice[0]} is there twice. Pass it once.")
    parts = 1
    while len({path.parts[-parts:] for path in absolute}) < len(absolute):
        parts += 1
    return ["/".join(path.parts[-parts:]) for path in absolute]


def _data_set(name: str, path: Path, settings: Settings) -> Data:
    rows = tuple(read_rows(path, settings.rows))
    asked = tuple(row for row in rows if row.messages)[: settings.generate]
    judge = Judge(asked, settings.answer_pattern) if asked else None
    return Data(name, rows=rows, asked=asked, judge=judge)


def _examples(made: Plan, subject: Subject, data: Data) -> list[Example]:
    if data.texts:
        sequences = tokenize(subject.tokenizer, list(data.texts), made.settings.tokens, made.length)
        return [Example(ids) for ids in sequences]
    examples, left_out = as_examples(data.rows, subject.tokenizer, made.longest)
    unfit = "without a second token to predict"
    if made.longest is not None:
        unfit = f"longer than the {made.longest} tokens that {made.shortest} takes, or {unfit}"
    if not examples:
        raise QALoraError(f"all rows of {data.name} are {unfit}: {subject.label}. Pass others.")
    if left_out:
        made.notes.append(
            f"{left_out} of {len(data.rows)} rows of {data.name} are {unfit}, and left out: {subject.label}"
        )
    return examples
