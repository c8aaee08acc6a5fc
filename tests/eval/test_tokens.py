import shutil

import pytest
from support.fabricate import make_tokenizer

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.examples import read_rows
from qalora_plugin.eval.tokens import (
    default_texts,
    is_text_file,
    joined_text,
    load_tokenizer,
    read_texts,
    sample_dataset,
    tokenize,
)


def test_sample_dataset_takes_ids_up_to_the_limit():
    rows = [{"input_ids": [1, 2, 3], "labels": [0]}] * 5
    assert sample_dataset(rows, 7) == [[1, 2, 3], [1, 2, 3]]
    assert sample_dataset([{"chosen_ids": [4, 5], "text": "x"}], 7) == [[4, 5]]
    assert sample_dataset([{"text": "x"}], 7) == []
    assert sample_dataset(None, 7) == []
    for strange in ([("a", 1)], [{"input_ids": [[1, 2]]}], [{"input_ids": 5}], [{"input_ids": "text"}], ["x"]):
        assert sample_dataset(strange, 7) == []


def test_read_texts(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}], "n": 1}\n"plain"\n')
    assert read_texts(tmp_path / "a.txt") == ["hello"]
    assert read_texts(tmp_path / "a.jsonl") == ["hi", "plain"]
    for name in ("A.JSONL", "a.ndjson"):  # were measured as JSON
        shutil.copyfile(tmp_path / "a.jsonl", tmp_path / name)
        assert read_texts(tmp_path / name) == ["hi", "plain"]
        assert is_text_file(str(tmp_path / "none" / name))


@pytest.mark.parametrize("read", [read_texts, lambda path: [row.answer for row in read_rows(path)]])
def test_lines_as_other_programs_write_them(read, tmp_path):
    """A mark at the beginning, characters that Python takes for ends of lines, half a character."""
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a\u2028b\x85c"}\r\n{"text": "d\\ud83d"}'.encode())
    assert read(tmp_path / "a.jsonl") == ["a\u2028b\x85c", "d?"]


@pytest.mark.parametrize(("content", "match"), [("{oops", "is not JSON lines"), ("\n", "holds no text")])
def test_bad_texts(tmp_path, content, match):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(QALoraError, match=match):
        read_texts(tmp_path / "bad.jsonl")
    with pytest.raises(QALoraError, match="does not exist"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(QALoraError, match="is no file"):
        read_texts(tmp_path)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(QALoraError, match="holds data, not text"):
        read_texts(tmp_path / "bad.json")


def test_of_chats_what_was_said():
    """Beside the messages stand ids and sources, which nobody writes."""
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    row = {"prompt_id": "f0e3", "messages": said, "source": "hub"}
    assert joined_text(row) == "hi\nyou"
    shared = {"id": "1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "you"}]}
    assert joined_text(shared) == "hi\nyou"
    assert joined_text({"messages": [], "text": "plain"}) == "plain"
    assert joined_text({"messages": ["a", "b"]}) == "a\nb"


def test_of_rows_with_a_text_that_alone():
    """Beside it stand addresses and times, as in C4."""
    row = {"url": "https://x.y/z", "text": "hello", "timestamp": "2019-01-01", "meta": {"set": "C4"}}
    assert joined_text(row) == "hello"
    assert joined_text({"id": "1", "content": "code"}) == "code"
    assert joined_text({"text": "", "question": "two?", "answer": "2"}) == "\ntwo?\n2"


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3", "gemma2"])
def test_a_tokenizer_without_its_files(model_type, tmp_path):
    """transformers makes an empty one for these, and every text would be one unknown token or none."""
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}", "vocab_size": 128}}')
    with pytest.raises(QALoraError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("hi").input_ids == make_tokenizer()("hi").input_ids


def test_tokenize_cuts_and_stops():
    sequences = tokenize(make_tokenizer(), default_texts(), max_tokens=1000, length=256)
    assert [len(sequence) for sequence in sequences] == [256, 256, 256, 232]
    for few in (1, -5):
        with pytest.raises(QALoraError, match=f"{few} tokens were asked for, expected 2 or more"):
            tokenize(make_tokenizer(), default_texts(), few)
