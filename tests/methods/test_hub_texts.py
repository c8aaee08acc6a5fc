"""Calibration text of the Hub: what is said in its chats, and a network that may end."""

import pytest

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


def test_texts_of_a_hubs_chats(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Hub(CHATS))
    assert quantizing._hub_texts("some/chats", 8) == ["hi\nyou"]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Hub(CHATS, TimeoutError("read timed out")))
    with pytest.raises(
        QALoraError, match=r"neither a local .* nor a dataset that can be had from the Hub: read timed out"
    ):
        quantizing._hub_texts("some/chats", 8)
