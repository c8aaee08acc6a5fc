"""Damaged and hostile adapters and merged checkpoints of others: one clear error each, nothing half written."""

import random
import shutil
import signal

import pytest
from conversion.test_import_official import make_official_adapter, merge_as_they_do, unpacked, write_merged
from fuzz.mutate import mutate
from fuzz.run import PATIENCE, content, stop
from support.fabricate import make_base
from support.peft_pooled import make_peft_qalora

from qalora_plugin.conversion.import_adapter import import_peft
from qalora_plugin.conversion.import_official import import_official
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.official import ZEROS

MUTATIONS = 40  # of each kind


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    root = tmp_path_factory.mktemp("intact")
    base = make_base(root / "base")
    make_peft_qalora(base, root / "peft")
    official = make_official_adapter(base, root / "official", rank=4)
    state = unpacked(base, ZEROS)
    merge_as_they_do(state, official)
    return {
        "peft": (base, root / "peft"),
        "official": (base, official),
        "merged": (write_merged(base, root / "merged", state), root / "peft"),
    }


@pytest.mark.parametrize("kind", ["peft", "official", "merged"])
def test_one_clear_error_or_an_import(intact, tmp_path, kind, monkeypatch):
    chance, outcomes = random.Random(kind), {True: 0, False: 0}
    signal.signal(signal.SIGALRM, stop)
    for i in range(MUTATIONS):
        arena = tmp_path / str(i)
        base, adapter = arena / "base", arena / "adapter"
        for source, target in zip(intact[kind], (base, adapter), strict=True):
            shutil.copytree(source, target)
        (arena / "outside").mkdir()
        (arena / "outside" / "secret.json").write_text('{"secret": "TOP"}')
        monkeypatch.chdir(arena)  # where mutations would put what they run
        what, before, out = mutate(base, adapter, chance), content(arena), arena / "out"
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        refused = None
        try:
            if kind == "peft":
                import_peft(adapter, out, base)
            else:
                import_official(base if kind == "merged" else adapter, out, None if kind == "merged" else base)
        except QALoraError as error:
            refused = str(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        outcomes[refused is None] += 1
        assert out.exists() == (refused is None), what
        assert refused is None or refused.isprintable(), what
        after = content(arena)
        assert {name: after.get(name) for name in before} == before, what
        assert {name.split("/")[0] for name in after.keys() - before.keys()} <= {"out"}, what
        assert not any(isinstance(value, bytes) and b"TOP" in value for name, value in after.items() if "out/" in name)
        shutil.rmtree(arena)
    assert min(outcomes.values()) > MUTATIONS // 10  # or the mutations are of the wrong kind
