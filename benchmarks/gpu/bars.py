"""The bars of the GPU check against what its CSVs hold: a table, whatever part of them there is."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from report import print_table

Row = dict[str, str]


def print_bars(out: Path) -> None:
    rows = [
        *_tests(out / "gpu_gpu_tests.txt"),
        *_tests(out / "gpu_tests.txt"),
        *_training(out),
        *_linear(_read(out / "gpu_linear.csv")),
    ]
    rows += _decoding(_read(out / "gpu_decode.csv"))
    print()
    print_table(["what", "bar", "found", "holds"], rows or [["nothing was measured", "", "", ""]])


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _against(what: str, found: float, bar: float, at_least: bool) -> list[str]:
    holds = found >= bar if at_least else found <= bar
    return [what, f"{'≥' if at_least else '≤'} {bar:g}", f"{found:.3f}", "yes" if holds else "NO"]


def _tests(log: Path) -> Iterator[list[str]]:
    if log.is_file():
        words = re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b(?! *-)", log.read_text())
        found = {word: words.count(word) for word in dict.fromkeys(words)}
        bad = found.get("FAILED", 0) + found.get("ERROR", 0)
        text = ", ".join(f"{count} {word.lower()}" for word, count in found.items())
        yield ["tests", "all", text, "yes" if found.get("PASSED") and not bad else "NO"]


def _training(out: Path) -> Iterator[list[str]]:
    rows = [row for path in sorted(out.glob("gpu_train_*.csv")) for row in _read(path) if row["tokens_per_second"]]

    def of(method: str, scenario: tuple[str, ...]) -> Row | None:
        return next((row for row in rows if (row["method"], *_scenario(row)) == (method, *scenario)), None)

    for mine in (row for row in rows if row["method"] == "ours"):
        scenario = _scenario(mine)
        tokens = int(mine["batch"]) * int(mine["length"])
        name = "{}×{} R{} g{}{}".format(*scenario[:4], ", checkpointing" if scenario[4] == "True" else "")
        for method, bar in {"dense": 0.90 if tokens >= 4096 else 0, "lora": 1.0, "qlora": 1.4, "peft": 1.5}.items():
            if other := of(method, scenario):
                ratio = float(mine["tokens_per_second"]) / float(other["tokens_per_second"])
                yield _against(f"step {name}, tokens/s ÷ {method}", ratio, bar, at_least=True)
        if other := of("scales", scenario):
            ratio = float(other["tokens_per_second"]) / float(mine["tokens_per_second"])
            yield _against(f"step {name}, with scales ÷ without, tokens/s", ratio, 0.85, at_least=True)
        if scenario == ("1", "2048", "64", "32", "True"):
            yield _against(f"step {name}, peak GB", float(mine["peak_gb"]), 8.0, at_least=False)


def _scenario(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("batch", "length", "rank", "group_size", "checkpointing"))


def _linear(rows: list[Row]) -> Iterator[list[str]]:
    """What offsets add, the fastest way, to the kernel that stock vLLM takes (Machete where it can); largest share."""
    rows = [row for row in rows if row["us"] and row["dtype"] == "bfloat16"]
    for group_size, bars in {"128": (0.08, 0.03), "32": (0.15, 0.05)}.items():
        for few, bar in zip((True, False), bars, strict=True):
            shares = []
            for key in {(row["shape"], row["rows"]) for row in rows if row["group_size"] == group_size}:
                if few != (key[1] == "1") or (not few and int(key[1]) < 128):
                    continue
                here = [row for row in rows if (row["shape"], row["rows"], row["group_size"]) == (*key, group_size)]
                stock = {row["path"]: float(row["us"]) for row in here if row["path"] in ("marlin", "machete")}
                merged = [float(row["us"]) for row in here if row["added"]]
                if stock and merged:
                    shares.append(min(merged) / stock.get("machete", stock.get("marlin", 0)) - 1)
            if shares:
                what = f"linear g{group_size}, M {'1' if few else '≥ 128'}: added by offsets, best path"
                yield _against(what, max(shares), bar, at_least=False)


def _decoding(rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        if row["of_base"] and row["path"] not in ("base", "dense"):
            bar = 0 if "LoRA" in row["path"] else 0.97
            what = f"decode g{row['group_size']}, {row['sequences']} sequences: {row['path']} ÷ base"
            yield _against(what, float(row["of_base"]), bar, at_least=True)
