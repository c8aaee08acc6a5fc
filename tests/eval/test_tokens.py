import pytest
from support.fabricate import make_tokenizer

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.examples import read_rows
from qalora_plugin.eval.tokens import default_texts, read_texts, sample_dataset, tokenize


def test_sample_dataset_takes_ids_up_to_the_limit():
    rows = [{"input_ids": [1, 2, 3], "labels": [0]}] * 5
    assert sample_dataset(rows, 7) == [[1, 2, 3], [1, 2, 3]]
    assert sample_dataset([{"chosen_ids": [4, 5], "text": "x"}], 7) == [[4, 5]]
    assert sample_dataset([{"text": "x"}], 7) == []
    assert sample_dataset(None, 7) == []


def test_read_texts(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}], "n": 1}\n"plain"\n')
    assert read_texts(tmp_path / "a.txt") == ["hello"]
    assert read_texts(tmp_path / "a.jsonl") == ["user\nhi", "plain"]


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


def test_tokenize_cuts_and_stops():
    sequences = tokenize(make_tokenizer(), default_texts(), max_tokens=1000, length=256)
    assert [len(sequence) for sequence in sequences] == [256, 256, 256, 232]
