"""Damage to checkpoints, adapters and configs: what accidents leave, and what bad intentions would write."""

import copy
import json
import math
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ESCAPE = "\x1b[31m\x1b]0;owned\x07[bold]\u202e"
STRINGS = [
    "", " ", "x", "../../outside", "/etc/passwd", "\0", ESCAPE, "a" * 5000, "\ud800", "[/]",
    "---\n- a: !!python/x",
    "{{ 7 * 7 }}", "int4", "float16", "gptq", "gptq_v2", "qalora", "QALORA", "4", "true", "null", "(a+)+$", "(",
    "(a|a)*b", ".*.*.*.*.*.*.*.*x", "model.safetensors", "offsets.safetensors", "owner/name", "~nobody/x",
    "<script>", "é" * 300,
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 3, 5, 8, 31, 33, 2**31, -(2**31), 2**63, 2**64, 10**400, 0.0, 0.5, -0.5, 1e308, -1e308, 1e-320,
    math.nan, math.inf, -math.inf,
]  # fmt: skip
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U16",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "X",
    7,
    None,
]


def nasty(chance: random.Random) -> Any:
    """A value that nobody expects."""
    kind = chance.randrange(8)
    if kind == 0:
        return chance.choice([None, True, False])
    if kind in (1, 2):
        return chance.choice(NUMBERS)
    if kind in (3, 4):
        return chance.choice(STRINGS)
    if kind == 5:
        return [nasty(chance) for _ in range(chance.randrange(3))]
    if kind == 6:
        return {chance.choice([*STRINGS, "quant_method", "bits"]): nasty(chance) for _ in range(chance.randrange(3))}
    value: Any = 0
    for _ in range(chance.choice([3, 100])):
        value = [value] if chance.random() < 0.5 else {"x": value}
    return value


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of everything inside a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated_value(tree: Any, chance: random.Random) -> Any:
    """A copy with one to three places replaced, removed, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        found = list(places(tree))
        if not found or chance.random() < 0.02:
            return nasty(chance)
        *parents, last = chance.choice(found)
        holder = tree
        for key in parents:
            holder = holder[key]
        kind = chance.randrange(6)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.choice(STRINGS)] = holder.pop(last)
        elif kind == 2 and isinstance(holder, dict):
            holder[chance.choice(STRINGS)] = nasty(chance)
        else:
            holder[last] = nasty(chance)
    return tree


def json_text(path: Path, chance: random.Random) -> None:
    """Damage a JSON file: its values mostly, sometimes its text."""
    content = json.loads(path.read_text())
    if chance.random() < 0.8:
        path.write_text(json.dumps(mutated_value(content, chance)))
        return
    text = path.read_bytes()
    key = chance.choice(list(content)) if content else "x"
    path.write_bytes(
        chance.choice(
            [
                b"", b"[]", b"3", b"null", b'"x"', b"\xff\xfe\x00", b"\xef\xbb\xbf" + text, text[: len(text) // 2],
                b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000, b"1" * 5000, text + b"}",
                b'{"' + key.encode() + b'": 1, ' + text.lstrip()[1:], text.replace(b'"', b"'"), text[::-1],
                json.dumps(content).encode("utf-16"), b"{" + b" " * 100_000 + b"}", text.replace(b":", b"::", 1),
            ]
        )
    )  # fmt: skip


def tensors_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_tensors(path: Path, header: Any, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def retyped(path: Path, chance: random.Random) -> None:
    """A well-formed file with one tensor of another dtype or shape, the same number of bytes, or another name."""
    header, body = tensors_of(path)
    name = chance.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
    kind = chance.randrange(4)
    count = math.prod(entry["shape"])
    if kind == 0:
        same = [dtype for dtype, size in sizes.items() if size == sizes.get(entry["dtype"]) and dtype != entry["dtype"]]
        entry["dtype"] = chance.choice(same or ["I32"])
    elif kind == 1:
        entry["shape"] = chance.choice([[count], [1, count], [count, 1], [], [0], [count, 1, 1], entry["shape"][::-1]])
    elif kind == 2:
        wider = chance.choice([1, 2, 4, 8])
        entry["dtype"] = {1: "U8", 2: "I16", 4: "F32", 8: "I64"}[wider]
        entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // wider]
    else:
        del header[name]
        header[
            chance.choice(
                [f"{name}{ESCAPE}", ".qweight", f"{name}.offsets", f"{name}_a", "x" * 2000, f"{name} ", "é.qweight", ""]
            )
        ] = entry
    write_tensors(path, header, body)


def broken(path: Path, chance: random.Random) -> None:
    """A file that is not well-formed, or only just."""
    header, body = tensors_of(path)
    data = path.read_bytes()
    kind = chance.randrange(7)
    if kind == 0:
        write_tensors(path, mutated_value(header, chance), body)
    elif kind == 1:
        length = chance.choice([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_001, len(data)])
        path.write_bytes(struct.pack("<Q", length) + data[8:])
    elif kind == 2:
        path.write_bytes(data[: chance.randrange(len(data))])
    elif kind == 3:
        write_tensors(
            path, chance.choice([b"[" * 100_000, b"{}", b"[]", b"null", b'{"a":' * 1000, b"\xff", b" " * 10]), body
        )
    elif kind == 4:
        text = json.dumps(header)
        name = next(key for key in header if key != "__metadata__")
        write_tensors(path, ("{" + json.dumps(name) + ":" + json.dumps(header[name]) + "," + text[1:]).encode(), body)
    elif kind == 5:
        header[chance.choice(list(header))]["dtype"] = chance.choice(DTYPES)
        write_tensors(path, header, body)
    else:
        path.write_bytes(data + b"\0" * chance.choice([1, 4096]))


def values(path: Path, chance: random.Random) -> None:
    """Other bytes inside one tensor: NaN and Inf among floats, anything among integers."""
    header, body = tensors_of(path)
    start, end = header[chance.choice([key for key in header if key != "__metadata__"])]["data_offsets"]
    body = bytearray(body)
    kind = chance.randrange(3)
    if kind == 0:
        body[start:end] = bytes([chance.choice([0xFF, 0x7F, 0x7C, 0, 0x80])]) * (end - start)
    else:
        for _ in range(chance.choice([1, 16])):
            body[chance.randrange(start, max(end, start + 1)) % len(body)] = chance.randrange(256)
    write_tensors(path, header, bytes(body))


def entry(path: Path, chance: random.Random) -> None:
    """Something else than a file under its name."""
    outside = path.parent.parent / "outside"
    kind = chance.randrange(6)
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(outside / "secret.json")
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.symlink_to("/dev/zero")


def planted(path: Path, chance: random.Random) -> None:
    """Files beside the model that must not be run, read or copied."""
    folder, outside = path.parent, path.parent.parent / "outside"
    name = chance.choice(
        ["id_rsa", ".env", "train.log", "pytorch_model.bin", "tokenizer.json", "modeling_x.py", ESCAPE]
    )
    target = folder / name
    target.unlink(missing_ok=True)
    if chance.random() < 0.5:
        target.symlink_to(outside / "secret.json")
    else:
        target.write_text("import pathlib; pathlib.Path('OWNED').touch()")


FILES: dict[str, list[Callable]] = {
    ".json": [json_text, json_text, json_text, entry, planted],
    ".safetensors": [retyped, retyped, broken, values, entry],
}


def mutate(base: Path, adapter: Path, chance: random.Random) -> str:
    """Damage one or two files of these two folders; returns what was done."""
    done = []
    for _ in range(chance.choice([1, 1, 1, 2])):
        files = [path for path in [*base.iterdir(), *adapter.iterdir()] if path.is_file() and path.suffix in FILES]
        weighted = [path for path in sorted(files) for _ in range(1 if "tokenizer" in path.name else 4)]
        path = chance.choice(weighted)
        mutation = chance.choice(FILES[path.suffix])
        try:
            mutation(path, chance)
        except (ValueError, KeyError, RecursionError, TypeError, IndexError, AttributeError):
            continue  # damaged by the first mutation beyond what the second can read
        done.append(f"{mutation.__name__} {path.parent.name}/{path.name}")
    return ", ".join(done)
