"""Folders that are complete or absent: nothing of anybody else's is touched, whatever lies in the way."""

import errno
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qalora_plugin.checkpoint import atomic, places
from qalora_plugin.checkpoint.atomic import new_file, new_folder
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError


@pytest.fixture
def stranger(tmp_path) -> Path:
    """A folder that is nobody's business."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    return folder


def hidden(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob(".*"))


@pytest.mark.parametrize("name", [".out.partial", ".out.partial-abcdefgh"])
@pytest.mark.parametrize("write", [merge, export_lora], ids=["merge", "export"])
def test_planted_links_lead_nowhere(base, adapter, tmp_path, stranger, write, name):
    (tmp_path / name).symlink_to(stranger)
    write(**{"base": base, "adapter": adapter, "out": tmp_path / "out"})
    assert [path.read_text() for path in stranger.iterdir()] == ["mine"]
    assert not (tmp_path / "out").is_symlink()


def test_folders_that_only_look_like_leftovers_stay(tmp_path):
    """No lock file of ours: not ours, whatever the name says. But an empty one may be removed."""
    for name, content in {"a": "notes.txt", "b": "folder"}.items():
        (tmp_path / f".out.partial-{name}").mkdir()
        (tmp_path / f".out.partial-{name}" / content).write_text("mine")
    (tmp_path / ".out.partial-c").mkdir()
    (tmp_path / ".out.partial-d").write_text("a file")
    with new_folder(tmp_path / "out"):
        pass
    assert hidden(tmp_path) == [".out.partial-a", ".out.partial-b", ".out.partial-d"]


def test_leftovers_of_killed_runs_are_swept_and_what_lies_beside_them_is_not(tmp_path, stranger):
    left = tmp_path / ".out.partial-left"
    (left / "folder" / "deep").mkdir(parents=True)
    (left / "folder" / "deep" / "x").write_text("x")
    (left / "folder" / "link").symlink_to(stranger)
    (left / "lock").touch()
    (tmp_path / ".other.partial-left").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert hidden(tmp_path) == [".other.partial-left"]
    assert (stranger / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("planted", ["empty folder", "folder", "file", "link"])
def test_what_appears_under_the_name_while_writing_is_not_replaced(tmp_path, planted):
    out = tmp_path / "out"

    def write_while_it_is_planted():
        with new_folder(out) as work:
            (work / "x").write_text("ours")
            if planted.endswith("folder"):
                out.mkdir()
                if planted == "folder":
                    (out / "x").write_text("theirs")
            elif planted == "file":
                out.write_text("theirs")
            else:
                out.symlink_to("nowhere")

    with pytest.raises(QALoraError, match="in the meantime"):
        write_while_it_is_planted()
    assert out.is_symlink() or out.exists()
    if planted == "folder":
        assert (out / "x").read_text() == "theirs"
    assert not hidden(tmp_path)


@pytest.mark.parametrize("planted", ["empty folder", "folder", "file", None])
def test_the_same_where_the_system_has_no_such_rename(tmp_path, monkeypatch, planted):
    monkeypatch.setattr(atomic, "_renameat2", lambda *_: False)
    test = test_what_appears_under_the_name_while_writing_is_not_replaced
    if planted:
        test(tmp_path, planted)
        return
    with new_folder(tmp_path / "out") as work:
        (work / "x").write_text("ours")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_work_folder_that_is_exchanged_is_noticed(tmp_path, stranger):
    def write_while_it_is_exchanged():
        with new_folder(tmp_path / "out") as work:
            work.parent.rename(tmp_path / "elsewhere")
            work.parent.mkdir()
            work.symlink_to(stranger)

    with pytest.raises(QALoraError, match="was replaced while it was written"):
        write_while_it_is_exchanged()
    assert (stranger / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_lock_on_what_was_removed_counts_for_nothing(tmp_path, monkeypatch):
    """Between making a work folder and locking it, another run may take it for a leftover."""
    take, swept = atomic._take, []

    def sweep_first(lock):
        if not swept:
            swept.extend(tmp_path.glob(".out.partial-*"))
            (swept[0] / "lock").unlink()
            swept[0].rmdir()
        return take(lock)

    monkeypatch.setattr(atomic, "_take", sweep_first)
    with new_folder(tmp_path / "out") as work:
        assert work.parent != swept[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [signal.SIGTERM, signal.SIGHUP], ids=lambda code: code.name)
@pytest.mark.parametrize("moment", ["writing", "making", "removing"])
def test_terminated(tmp_path, code, moment):
    """Cleaned up, and ended by that signal all the same; what must not be torn is finished first."""
    program = f"""
import os, signal, sys
from pathlib import Path
signal.signal({int(code)}, signal.SIG_DFL)  # nohup ignores it
from qalora_plugin.checkpoint import atomic
def hit(*_): os.kill(os.getpid(), {int(code)})
def then(f): return lambda *a: (f(*a), hit())[0]
def first(f): return lambda *a: (hit(), f(*a))[1]
moment = sys.argv[2]
if moment == "making": atomic._make_work_folder = then(atomic._make_work_folder)
if moment == "removing": atomic._remove = first(atomic._remove)
with atomic.new_folder(Path(sys.argv[1])) as work:
    (work / "x").write_text("x")
    if moment == "writing": hit()
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "out", moment])
    assert done.returncode == -code
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if moment == "removing" else [])


def test_a_programs_own_handlers_stay(tmp_path):
    handler, hangup = signal.signal(signal.SIGTERM, lambda *_: None), signal.getsignal(signal.SIGHUP)
    try:
        with new_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (tmp_path / "out").exists()
        assert signal.getsignal(signal.SIGHUP) is hangup
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(base, adapter, tmp_path, umask):
    before = os.umask(umask)
    shard = base / "model.safetensors"
    mode = stat.S_IMODE(shard.stat().st_mode)
    try:
        merge(base, adapter, tmp_path / "out", progress=False)
        export_lora(adapter, tmp_path / "lora", base)
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "lora"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
        for path in folder.iterdir():
            expected = mode if path.stat().st_nlink > 1 else 0o666 & ~umask
            assert stat.S_IMODE(path.stat().st_mode) == expected, path
    assert stat.S_IMODE(shard.stat().st_mode) == mode  # a link: the base's own


@pytest.mark.parametrize(
    ("out", "match"),
    [
        ("/proc/nowhere/out", r"/proc is not writable \(No such file"),
        ("x" * 300, "File name too long. Choose a shorter name"),
        ("file/out", "is a file, not a folder"),
    ],
)
def test_places_that_cannot_be_written(base, adapter, tmp_path, out, match):
    (tmp_path / "file").touch()
    with pytest.raises(QALoraError, match=match) as caught:
        merge(base, adapter, tmp_path / out, progress=False)
    assert "\n" not in str(caught.value)


def test_the_longest_name(tmp_path):
    with new_folder(tmp_path / ("ä" * 127)):
        pass
    assert len(os.listdir(tmp_path)) == 1


def test_stress():
    """A short round of ``stress.py``, whose full one is 500 kills and 2000 races."""
    script = Path(__file__).parents[1] / "stress.py"
    done = subprocess.run([sys.executable, script, "--kills", "30", "--races", "30"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert re.search(r"raced: .* 0 half, 0 mixed, 0 foreign, 0 errors, 0 left over", done.stdout)


def test_a_new_file_is_complete_or_absent(tmp_path):
    out = tmp_path / "model.gguf"
    with pytest.raises(RuntimeError, match=r"^half way$"):
        half_a_file(out)
    assert list(tmp_path.iterdir()) == []

    with new_file(out) as path:
        path.write_bytes(b"whole")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert out.read_bytes() == b"whole"

    with pytest.raises(QALoraError, match="exists"), new_file(out):
        pass
    other = tmp_path / "other.gguf"
    with pytest.raises(QALoraError, match="by another process"):
        two_files(other)
    assert other.read_bytes() == b"theirs"


def half_a_file(out: Path) -> None:
    with new_file(out) as path:
        path.write_bytes(b"half")
        raise RuntimeError("half way")


def two_files(out: Path) -> None:
    with new_file(out) as path:
        path.write_bytes(b"ours")
        out.write_bytes(b"theirs")


def test_whether_a_place_can_be_written_is_found_out_without_a_trace(tmp_path, monkeypatch):
    """A run may be killed at any moment, and nobody would remove what has a name of its own."""
    monkeypatch.setattr(places, "mkdtemp", lambda **_: pytest.fail("something with a name"))
    places.require_writable(tmp_path / "out", "--out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """Lustre, unless mounted for them: work goes on, and what killed runs left there stays."""

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    left = tmp_path / ".out.partial-1"
    (left / "folder").mkdir(parents=True)
    (left / "lock").touch()
    with new_folder(tmp_path / "out") as work:
        (work / "file").write_text("whole")
    assert (tmp_path / "out" / "file").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-1", "out"]
