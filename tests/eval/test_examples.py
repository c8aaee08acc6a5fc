"""Rows of a file: what a model is given, and which tokens count."""

import json
import re
from types import SimpleNamespace

import pytest
from support.fabricate import make_tokenizer

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.examples import as_examples, as_row, prompt_ids, read_rows

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SAME = [
    {"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "2"}]},
    {"question": "two?", "answer": "2"},
    {"prompt": "two?", "completion": "2"},
]


ASKED, ANSWERED = SAME[0]["messages"]


@pytest.fixture
def chat():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts(example, tokenizer):
    return tokenizer.decode(example.ids[: example.start]), tokenizer.decode(example.ids[example.start :])


@pytest.mark.parametrize("row", SAME, ids=lambda row: next(iter(row)))
def test_in_a_chat_template_the_answer_ends_as_the_template_ends_it(row, chat):
    prompt, answer = texts(as_row(row).example(chat), chat)
    assert prompt.replace(" ", "") == "<s>user:two?</s>\n<s>assistant:"
    assert answer.replace(" ", "") == "2</s>"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [(SAME[0], "User: two?\nAssistant: "), (SAME[1], "User: two?\nAssistant: "), (SAME[2], "two?")],
    ids=lambda value: str(value)[:12],
)
def test_without_a_template(row, prompt):
    tokenizer = make_tokenizer()
    example = as_row(row).example(tokenizer)
    assert example.ids == [*tokenizer(prompt).input_ids, *tokenizer("2").input_ids, tokenizer.eos_token_id]
    assert example.start == len(tokenizer(prompt).input_ids)


EDITED = {  # template's way with an answer → what counts for "two\n"
    "{{ m.content | upper }}": "TWO\n</s>",
    "{{ m.content | trim }}": "two</s>",
    "<think>\n\n</think>\n\n{{ m.content | trim }}": "two</s>",
    "{{ m.content | trim }} ok": "two ok</s>",
    "{{ m.content | trim }} ": "two </s>",
}


@pytest.mark.parametrize("written", EDITED)
def test_what_counts_is_what_a_template_makes_of_the_answer(written, chat):
    """As in training, where it writes the whole chat: some edit answers, or put thoughts before them."""
    chat.chat_template = TEMPLATE.replace("{{ m.content }}", written)
    row = as_row({"question": "two?", "answer": "two\n"})
    example = row.example(chat)
    messages = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "two\n"}]
    whole = chat(chat.apply_chat_template(messages, tokenize=False).strip(), add_special_tokens=False).input_ids
    assert example.ids == whole
    assert whole[example.start :] == chat(EDITED[written], add_special_tokens=False).input_ids
    assert row.before_answer(chat).endswith(written.partition("{{")[0])


class Words:
    """A tokenizer that joins a space with the word behind it, as most do."""

    eos_token_id = 0
    chat_template = "there is one"

    def apply_chat_template(self, messages, tokenize, **_):
        return "".join(f"[{message['role']}] {message['content']}." for message in messages)

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=re.findall(r" ?\w+|\W", text))


def test_a_space_before_the_answer_is_its_first_words():
    example = as_row(SAME[1]).example(Words())
    assert example.ids[example.start :] == [" 2", "."]


def test_nor_is_it_a_token_of_its_own_without_a_template():
    """Prompt and answer were tokenized apart, and the model given a space and an answer that begins without one."""
    words = Words()
    words.chat_template = None
    for row in SAME[:2]:
        example = as_row(row).example(words)
        assert "".join(example.ids[: example.start]) == "User: two?\nAssistant:"
        assert example.ids[example.start] == " 2"
        assert as_row(row).prompt(words) == "User: two?\nAssistant:"
    assert as_row({"prompt": "two is ", "completion": "2"}).prompt(words) == "two is "


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"system": "Be brief.", **SAME[1]}, "system"),
        ({"context": "1 + 1 = 2", **SAME[1]}, "context"),
        ({"tools": [{"name": "add"}], **SAME[0]}, "tools"),
        ({"system": "Be brief.", **SAME[0]}, "system"),
        ({"context": "1 + 1 = 2", **SAME[0]}, "context"),
        ({"messages": [ASKED, {**ANSWERED, "reasoning_content": "1 + 1"}]}, "reasoning_content"),
        ({"messages": [ASKED, {**ANSWERED, "function_call": {"name": "f"}}]}, "function_call"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}, ASKED, ANSWERED]}, "tool_calls"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_would_not_be_shown_to_the_model(more, named):
    with pytest.raises(QALoraError, match=f"line 3 has {named}, which would not be shown to the model"):
        as_row(more, "line 3")
    assert as_row({"system": "", "context": None, "tools": [], "id": "7", "source": "hub", **SAME[1]})


def test_a_template_that_leaves_answers_out(chat):
    chat.chat_template = "{% for m in messages if m.role == 'user' %}<s>{{ m.content }}</s>{% endfor %}"
    with pytest.raises(QALoraError, match="writes nothing of the answer '2'"):
        as_row(SAME[1]).example(chat)


def test_another_end_than_the_end_of_text(chat):
    chat.chat_template = TEMPLATE.replace("</s>", "<unk>")  # as <end_of_turn> of Gemma
    example = as_row(SAME[1]).example(chat)
    assert example.ids[-1] == chat.unk_token_id


def test_earlier_turns_are_the_question():
    row = as_row({"messages": [{"role": "system", "content": "be brief"}, *SAME[0]["messages"]]})
    assert row.plain == "System: be brief\nUser: two?\nAssistant: "


SAID = {  # row → without a template, when something more is asked for
    '{"question": "e", "answer": "2"}': "User: e, please.\nAssistant: ",
    '{"prompt": "e", "completion": "2"}': "e, please.",
    '{"messages": [["system", "Say hi."], ["user", "hi"], ["assistant", "2"]]}': (
        "System: Say hi.\nUser: hi, please.\nAssistant: "
    ),
    '{"messages": [["user", "And?"], ["assistant", "1"], ["user", "And?"], ["assistant", "2"]]}': (
        "User: And?\nAssistant: 1\nUser: And?, please.\nAssistant: "
    ),
}


@pytest.mark.parametrize("row", SAID)
def test_what_is_asked_for_stands_at_the_end_of_the_question(row, chat):
    content = json.loads(row)
    if "messages" in content:
        content["messages"] = [{"role": role, "content": said} for role, said in content["messages"]]
    asked = as_row(content).asking(", please.")
    assert asked.plain == SAID[row]
    last = asked.messages[-1]["content"]
    assert asked.prompt(chat).endswith(f"<s>user: {last}</s>\n<s>assistant: ")


def test_columns_without_a_value_are_not_there():
    row = {"messages": None, "question": None, "answer": None, "text": "x"}
    assert as_row({"messages": [], "text": "x"}) == as_row(row)
    assert as_row(row).answer == "x"


def test_of_text_all_tokens_count(chat):
    example = as_row({"text": "two and two"}).example(chat)
    assert example == (chat("two and two").input_ids, 1)
    assert as_row({"text": "x"}).prompt(chat) == ""


def test_a_tokenizer_that_ends_prompts_does_not_here():
    tokenizer = make_tokenizer()
    closing = type("Closing", (), {"chat_template": None, "eos_token_id": 2})()
    closing.__class__.__call__ = lambda self, text, add_special_tokens: type(
        "Encoded", (), {"input_ids": [*tokenizer(text).input_ids, 2]}
    )
    assert prompt_ids(closing, "hi") == tokenizer("hi").input_ids


def test_too_long_rows_are_counted(chat):
    rows = [as_row({"text": "a" * count}) for count in (3, 50, 5, 1)]
    examples, left_out = as_examples(rows, chat, longest=10)
    assert [len(example.ids) for example in examples] == [3, 5]
    assert left_out == 2  # of one token none can be predicted


BAD = {
    "[1]\n": r"line 1 is \[1\], expected",
    '{"text": "x"}\n{"foo": 1}\n': "line 2 has 'foo', expected",
    "{}": "line 1 has no key",
    '{"text": 3}': "text is 3, expected a text",
    '{"question": "q"}': "answer is None",
    '{"messages": "hello"}': "line 1: messages is 'hello', expected a list",
    '{"messages": {"role": "user", "content": "x"}}': "messages is {'role': 'user', 'content': 'x'}, expected",
    '{"messages": []}': r"messages is \[\], expected a list",
    '{"messages": 0}': "messages is 0, expected a list",
    '{"messages": null}': "line 1 has no key with a value",
    '{"messages": [["user", "x"]]}': r"holds \['user', 'x'\], expected messages",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]}': "'content': None}, exp",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}': "content is '', expected",
    '{"messages": [{"role": "human", "content": "x"}, {"role": "gpt", "content": "y"}]}': "the role 'human', expected",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "ends with message 1, of role 'assistant'",
    '{"messages": [{"role": "user"}]}': "expected messages with the texts",
    '{"messages": [{"role": "user", "content": "x"}]}': "role 'user', expected a question and then",
    '{"text": "x"': "is not JSON lines",
    "[" * 100_000: "is not JSON lines",
    "\n \n": "holds no row",
    b"\xff\xfe": "is not JSON lines in UTF-8",
}


@pytest.mark.parametrize("content", BAD, ids=lambda content: repr(content)[:40])
def test_bad_files(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(QALoraError, match=BAD[content]) as error:
        read_rows(path)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(QALoraError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")


def test_most(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, SAME)))
    assert len(read_rows(path)) == 3
    assert len(read_rows(path, 2)) == 2
