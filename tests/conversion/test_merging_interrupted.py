"""Merges that are killed, run out of disk, race, or lose their base: nothing or everything is there."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from support.merges import SEQUENCES, refuse

from qalora_plugin.conversion import writer
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.verifying import verify
from qalora_plugin.formats.opened import QuantizedCheckpoint


@pytest.mark.parametrize(("limit", "copy"), [(20_000, True), (4_000, False)], ids=["shards", "offsets"])
def test_full_disk_leaves_nothing(base, adapter, tmp_path, limit, copy):
    """A file-size limit stands in for a full disk: the same errors from the same calls, without mounting anything."""
    code = (
        "import resource, signal, sys; from qalora_plugin.conversion.merging import merge; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); limit = int(sys.argv[1]); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)); "
        f"merge(*sys.argv[2:], copy={copy}, progress=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(limit), base, adapter, tmp_path / "out"], capture_output=True, text=True
    )
    assert "QALoraError: the disk of" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_space_is_known_beforehand(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refuse("MB free, .* MB are needed", base, adapter, tmp_path / "out")


@pytest.mark.parametrize("moment", range(4))
def test_killed_at_any_moment(base, adapter, tmp_path, moment):
    """SIGKILL in the middle of a slowed-down merge: nothing or everything under the final name; then merging works."""
    code = r"""
import os, sys, time
from qalora_plugin.conversion import added, merging, writer
slow = merging.link_or_copy
def slower(*args, **kwargs):
    os.write(1, b"step\n"); time.sleep(0.1); return slow(*args, **kwargs)
merging.link_or_copy = slower
offsets = added._offsets
def slow_offsets(*args):
    os.write(1, b"step\n"); time.sleep(0.02); return offsets(*args)
added._offsets = slow_offsets
merging.merge(*sys.argv[1:], progress=False)
os.write(1, b"step\n")  # the last moment: it is there
"""
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", code, base, adapter, out], stdout=subprocess.PIPE)
    for _ in range(1 + 5 * moment):
        assert child.stdout.readline() == b"step\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    if out.exists():
        assert verify(base, adapter, out, SEQUENCES, device="cpu", progress=False).passed
    else:
        merge(base, adapter, out, progress=False)
        assert not list(tmp_path.glob(".*.partial-*"))


def test_two_merges_at_once(base, adapter, tmp_path):
    from qalora_plugin.checkpoint.atomic import new_folder

    with new_folder(tmp_path / "out"), pytest.raises(QALoraError, match="another process is writing"):
        merge(base, adapter, tmp_path / "out", progress=False)


@pytest.mark.parametrize("copy", [False, True])
def test_a_base_that_changes_while_it_is_merged(base, adapter, tmp_path, monkeypatch, copy):
    folder = shutil.copytree(base, tmp_path / "base")
    write = writer.ShardWriter._flush

    def change(self):
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        write(self)

    monkeypatch.setattr(writer.ShardWriter, "_flush", change)
    refuse("was changed while it was being merged", folder, adapter, tmp_path / "out", copy=copy)


@pytest.mark.parametrize("what", ["model.safetensors", "config.json", "."])
def test_a_base_that_disappears_while_it_is_merged(base, adapter, tmp_path, monkeypatch, what):
    folder = shutil.copytree(base, tmp_path / "base")
    check = QuantizedCheckpoint.check_values

    def remove(source):
        check(source)
        shutil.rmtree(folder) if what == "." else (folder / what).unlink()

    monkeypatch.setattr(QuantizedCheckpoint, "check_values", remove)
    if what == "config.json":  # read already
        merge(folder, adapter, tmp_path / "out", progress=False)
    else:
        refuse("No such file", folder, adapter, tmp_path / "out")
