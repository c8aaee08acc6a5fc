"""Truncated and mutated GGUF files: one line each, no traceback of another kind, no absurd memory, nothing written."""

import random
import resource
import struct

import pytest
from support.gguf_files import make_model, make_tokenizer, write_gguf

from qalora_plugin.conversion.import_gguf import import_gguf
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.gguf.reading import GgufFile

MUTATIONS = 300
ABSURD = (0, 1, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, make_model("llama", **small), make_tokenizer(), "Q4_1", embeddings="Q8_0")


@pytest.fixture(scope="module")
def places(file):
    """Where the file's header, its metadata before the vocabulary, the list of its tensors, and their data begin."""
    content = file.read_bytes()
    opened = GgufFile.open(file)
    return {
        "start": (0, 24),
        "metadata": (24, content.index(b"tokenizer.ggml.tokens") + 48),
        "after the vocabulary": (content.index(b"tokenizer.ggml.bos_token_id"), opened._reader.data_offset),
        "data": (opened._reader.data_offset, len(content)),
        "all": (0, len(content)),
    }


def mutated(content: bytes, places: dict, seed: int) -> bytes:
    chance = random.Random(seed)
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        start, stop = places[chance.choice(list(places))]
        if len(data) <= start:
            continue
        at = chance.randrange(start, min(stop, len(data)))
        kind = chance.choice(("byte", "byte", "bit", "word", "long", "cut", "drop", "repeat"))
        if kind == "byte":
            data[at] = chance.randrange(256)
        elif kind == "bit":
            data[at] ^= 1 << chance.randrange(8)
        elif kind == "word":
            data[at : at + 4] = struct.pack("<I", chance.choice(ABSURD) & 0xFFFFFFFF)
        elif kind == "long":
            data[at : at + 8] = struct.pack("<Q", chance.choice(ABSURD))
        elif kind == "cut":
            del data[max(at, 1) :]
        elif kind == "drop":
            del data[at : at + chance.randrange(1, 40)]
        else:
            data[at:at] = data[at : at + chance.randrange(1, 40)]
    return bytes(data)


def test_mutated_files_are_read_or_refused_in_one_line(file, places, tmp_path):
    content, messages, read = file.read_bytes(), {}, 0
    import_gguf(file, tmp_path / "whole", progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    target = tmp_path / "mutated.gguf"
    for seed in range(MUTATIONS):
        target.write_bytes(mutated(content, places, seed))
        out = tmp_path / f"out{seed}"
        try:
            import_gguf(target, out, progress=False)
        except QALoraError as error:
            messages[seed] = str(error)
        else:
            read += 1
    assert len(messages) > MUTATIONS / 4
    assert read > MUTATIONS / 20
    assert [seed for seed, message in messages.items() if "\n" in message or len(message) > 3000] == []
    assert [seed for seed in messages if (tmp_path / f"out{seed}").exists()] == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("share", [0, 1e-5, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(share, file, tmp_path):
    content = file.read_bytes()
    target = tmp_path / "cut.gguf"
    target.write_bytes(content[: int(share * len(content))])
    with pytest.raises(QALoraError, match=r"cut.gguf is truncated or damaged \(.*\). Download or copy the file again."):
        import_gguf(target, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4" + bytes(100), "is no GGUF file"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "of GGUF version 50331648, expected 2 or 3, little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(100), "counts 0 keys and 1152921504606846976 tensors"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 0, 1 << 62) + bytes(100),
            "should hold 4611686018427387904 more",
        ),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 1) + bytes(100), "holds values of type 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(100), "has no general.architecture in its metadata"),
    ],
)
def test_what_is_no_gguf_file_is_refused(content, message, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(QALoraError, match=message):
        GgufFile.open(tmp_path / "model.gguf")


def test_one_of_several_parts_and_no_file_at_all(tmp_path):
    with pytest.raises(QALoraError, match=r"is no file. Pass"):
        GgufFile.open(tmp_path / "nothing.gguf")
    with pytest.raises(QALoraError, match="is no file"):
        GgufFile.open(tmp_path)
