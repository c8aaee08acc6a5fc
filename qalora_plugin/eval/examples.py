"""What models are measured on: rows of a file, as a chat or as plain text, and the tokens of them that count.

A row is ``{"messages": […]}``, ``{"question": …, "answer": …}`` (gsm8k's), ``{"prompt": …, "completion": …}`` or
``{"text": …}``. Of the first three only the answer's tokens count, its end included, as in training; of the last all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from qalora_plugin.checkpoint.hub import expanded
from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError, os_errors_in_one_line
from qalora_plugin.eval.tokens import ENCODING, parse_line

_PAIRS = (("question", "answer"), ("prompt", "completion"))
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
_UNSHOWN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # of a message
_OTHER_ANSWER = "\ue000"  # begins and ends as no answer does
_EXPECTED = '{"messages": […]}, {"question", "answer"}, {"prompt", "completion"} or {"text"}'


class Example(NamedTuple):
    """Token ids of a sequence; ``start``: the first of them that counts (the very first never does)."""

    ids: list[int]
    start: int = 1


@dataclass(frozen=True)
class Row:
    """A question and its answer.

    Attributes:
        messages: what comes before the answer, as a chat. answer: the last message; of mere text, all of it.
        named: whether, where there is no chat template, it is said whose turn each message is.
    """

    messages: tuple[dict[str, str], ...]
    answer: str
    named: bool = True

    @property
    def plain(self) -> str:
        """What comes before the answer where there is no chat template; ``""`` of mere text."""
        if not self.messages or not self.named:
            return "\n".join(message["content"] for message in self.messages)
        said = "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in self.messages)
        return f"{said}Assistant: "

    def asking(self, more: str) -> "Row":
        """The same with something added to the last message before the answer."""
        *before, last = self.messages
        return replace(self, messages=(*before, {**last, "content": last["content"] + more}))

    def prompt(self, tokenizer: Any) -> str:
        """What a model is given: in the chat template, if the tokenizer has one; ``""`` of mere text.

        Without one, and without the space that begins the answer: it is part of the answer's first token.
        """
        if not self.messages or not tokenizer.chat_template:
            return self.plain.rstrip(" ") if self.named else self.plain
        return _in_template(tokenizer, list(self.messages), add_generation_prompt=True)

    def before_answer(self, tokenizer: Any) -> str:
        """What stands before the answer in a text to train on: more than the prompt where a template adds thoughts."""
        return self._in_parts(tokenizer)[0] if self.messages and tokenizer.chat_template else self.plain

    def example(self, tokenizer: Any) -> Example:
        """Tokens of question and answer. The answer ends as the chat template ends it, else with the end of text."""
        if not self.messages:
            return Example(tokenizer(self.answer).input_ids)
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if not tokenizer.chat_template:
            before, ids = (prompt_ids(tokenizer, text) for text in (self.plain, self.plain + self.answer))
            return Example([*ids, *eos], max(1, _alike(ids, before)))
        context, answer, end = self._in_parts(tokenizer)
        ids = tokenizer(context + answer + end, add_special_tokens=False).input_ids
        before = tokenizer(context, add_special_tokens=False).input_ids  # may end in half a token, as a space
        return Example(ids if end else [*ids, *eos], max(1, _alike(ids, before)))

    def ends(self, tokenizer: Any) -> list[int]:
        """The special token with which the chat template ends an answer, which need not be the end of text."""
        end = self._in_parts(tokenizer)[2].strip() if self.messages and tokenizer.chat_template else ""
        ids = tokenizer(end, add_special_tokens=False).input_ids if end else []
        return [token for token in ids if token in tokenizer.added_tokens_decoder][:1]

    def _in_parts(self, tokenizer: Any) -> tuple[str, str, str]:
        """What the chat template writes before the answer, as the answer and after it: the two ends are what stays
        where another answer is written. Some templates edit answers, or add thoughts.

        Raises:
            QALoraError: it writes no answer.
        """
        written, other = (
            _in_template(tokenizer, [*self.messages, {"role": "assistant", "content": content}])
            for content in (self.answer, _OTHER_ANSWER)
        )
        start = _alike(written, other)
        stop = len(written) - _alike(written[start:][::-1], other[start:][::-1])
        if not written[start:stop].strip():
            raise QALoraError(
                f"the tokenizer's chat template writes nothing of the answer {short(self.answer)}. Use another one."
            )
        return written[:start], written[start:stop], written[stop:].rstrip()


def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (here, there) in pairs if here != there), min(len(one), len(other)))


def _in_template(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # whatever templates raise: many refuse a system's message, or two of one role
        raise QALoraError(
            f"the tokenizer's chat template cannot write {short([message['role'] for message in messages])} "
            f"({error}): {short(messages[0]['content'])}. Pass rows that it is for, or another template."
        ) from error


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a prompt: a chat template writes its special tokens itself, plain text gets the tokenizer's own."""
    ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template).input_ids
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not tokenizer.chat_template else ids


@os_errors_in_one_line()
def read_rows(path: str | Path, most: int | None = None) -> list[Row]:
    """Rows of a ``.jsonl`` file, ``most`` of them at most.

    Raises:
        QALoraError: no such file, no JSON lines, or a row that is of none of the kinds; it names the line.
    """
    path = expanded(path)
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise QALoraError(f"{path} {found}. Pass a .jsonl file with a row a line: {_EXPECTED}.")
    rows: list[Row] = []
    with path.open(encoding=ENCODING) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip() and (most is None or len(rows) < most):
                    rows.append(as_row(parse_line(line), f"{path}, line {number}"))
        except (ValueError, RecursionError) as error:
            if isinstance(error, QALoraError):
                raise
            raise QALoraError(f"{path} is not JSON lines in UTF-8: {error}. Write one JSON object a line.") from error
    if not rows:
        raise QALoraError(f"{path} holds no row. Pass a file with some: {_EXPECTED}.")
    return rows


def as_row(row: Any, where: object = "a row") -> Row:
    """
    Args:
        where: for messages.

    Raises:
        QALoraError: it is of none of the kinds.
    """
    if not isinstance(row, dict):
        raise QALoraError(f"{where} is {short(row)}, expected {_EXPECTED}.")
    row = {key: value for key, value in row.items() if value is not None}  # tables have a column for every kind of row
    if row.get("messages") == [] and row.keys() & {"text", *(key for pair in _PAIRS for key in pair)}:
        del row["messages"]
    if "messages" in row:
        _require_none(row, ("system", "context", "tools"), where)
        return _of_messages(row["messages"], where)
    for before, after in _PAIRS:
        if before in row or after in row:
            _require_none(row, ("system", "context", "tools"), where)
            question, answer = (_text(row, key, where) for key in (before, after))
            return Row(({"role": "user", "content": question},), answer, named=before != "prompt")
    if "text" in row:
        return Row((), _text(row, "text", where))
    raise QALoraError(f"{where} has {', '.join(map(short, row)) or 'no key with a value'}, expected {_EXPECTED}.")


def _of_messages(messages: Any, where: object) -> Row:
    if not isinstance(messages, list) or not messages:
        raise QALoraError(f"{where}: messages is {short(messages)}, expected a list of messages.")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise QALoraError(f"{where} holds {short(message)}, expected messages with the texts role and content.")
        _require_none(message, _UNSHOWN, where)
        if message["role"] not in _ROLES:  # chat templates leave out, in silence, what they do not know
            raise QALoraError(f"{where} has the role {short(message['role'])}, expected one of {', '.join(_ROLES)}.")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise QALoraError(
            f"{where} ends with message {len(messages)}, of role {short(messages[-1]['role'])}, expected a question "
            "and then the assistant's answer."
        )
    asked = tuple({key: message[key] for key in ("role", "content")} for message in messages[:-1])
    return Row(asked, _text(messages[-1], "content", where))


def _require_none(found: dict[str, Any], keys: Sequence[str], where: object) -> None:
    if left_out := [key for key in keys if found.get(key)]:
        raise QALoraError(
            f"{where} has {', '.join(left_out)}, which would not be shown to the model. Write all that it is to see "
            "into the contents of messages, or leave that out."
        )


def _text(row: dict[str, Any], key: str, where: object) -> str:
    found = row.get(key)
    if not isinstance(found, str) or not found:
        raise QALoraError(f"{where}: {key} is {short(found)}, expected a text.")
    return found


def as_examples(rows: Sequence[Row], tokenizer: Any, longest: int | None = None) -> tuple[list[Example], int]:
    """Tokens of rows, those of more than ``longest`` tokens left out, and how many these are."""
    examples = [row.example(tokenizer) for row in rows]
    kept = [one for one in examples if len(one.ids) > one.start and (longest is None or len(one.ids) <= longest)]
    return kept, len(examples) - len(kept)
