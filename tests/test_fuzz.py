"""A short seeded run of the fuzzer; `make fuzz` is the long one."""

import pytest
from fuzz.run import FAULTS, Fuzzer


@pytest.mark.parametrize(("only", "mutations"), [("folders", 120), ("configs", 120)])
def test_damaged_input_gives_one_clear_error(tmp_path, monkeypatch, only, mutations):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fuzzer = Fuzzer(tmp_path, seed=1)
    fuzzer.run(mutations, only)
    assert fuzzer.counts["mutations"] == mutations
    assert not any(fuzzer.counts[fault] for fault in FAULTS), "\n".join(fuzzer.seen)
