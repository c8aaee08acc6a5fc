"""Calibration text of the Hub: what is said in its chats, and a network that may end."""

import json

import pytest
from support.fabricate import make_tokenizer

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.methods import quantizing

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
    rows = quantizing.calibration_rows(tokenizer, str(text), 8, 256, 0)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert 8 * 256 <= tokens < 8 * 256 + 32
    assert "tokens to calibrate on" not in caplog.text
    quantizing.calibration_rows(tokenizer, str(text), 256, 512, 0)
    assert "tokens to calibrate on, not 256 × 512" in caplog.text
    with pytest.raises(QALoraError, match=r"tokens to calibrate on, of 1 × 16 .* more samples"):
        quantizing.calibration_rows(tokenizer, str(text), 1, 16, 0)


def test_texts_of_a_hubs_chats(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Hub(CHATS))
    assert quantizing._hub_texts("some/chats", 8) == ["hi\nyou"]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Hub(CHATS, TimeoutError("read timed out")))
    with pytest.raises(
        QALoraError, match=r"neither a local .* nor a dataset that can be had from the Hub: read timed out"
    ):
        quantizing._hub_texts("some/chats", 8)
