"""Calibration text of the Hub: what is said in its chats, and a network that may end."""

import json

import pytest
from support.fabricate import make_tokenizer

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.methods import calibration_text
from qalora_plugin.methods.calibration_text import read_calibration

CHATS = [
    {"prompt_id": "f0e3", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}
]


class Hub:
    """A dataset that comes row by row, over a network that may end."""

    def __init__(self, rows, error=None):
        self.rows, self.error = rows, error

    def take(self, count):
        yield from self.rows[:count]
        if self.error:
            raise self.error


def test_short_rows_make_as_many_tokens_as_were_asked_for(tmp_path, caplog):
    """Of a file of short rows as many as ``samples`` were taken, a fraction of the tokens."""
    tokenizer, text = make_tokenizer(), tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"question": f"what is {i}?", "answer": str(i)}) for i in range(2000)))
    tokens = sum(map(len, read_calibration(str(text), 8, 256, 0).sequences(tokenizer, 256)))
    assert 8 * 256 <= tokens < 8 * 256 + 32
    assert "tokens to calibrate on" not in caplog.text
    read_calibration(str(text), 256, 512, 0).sequences(tokenizer, 512)
    assert "tokens to calibrate on, not 256 × 512" in caplog.text
    with pytest.raises(QALoraError, match=r"tokens to calibrate on, of 1 × 16 .* more samples"):
        read_calibration(str(text), 1, 16, 0).sequences(tokenizer, 16)


def test_texts_of_a_hubs_chats(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Hub(CHATS))
    assert calibration_text._hub_texts("some/chats", 8) == ["hi\nyou"]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Hub(CHATS, TimeoutError("read timed out")))
    with pytest.raises(
        QALoraError, match=r"neither a local .* nor a dataset that can be had from the Hub: read timed out"
    ):
        calibration_text._hub_texts("some/chats", 8)
