"""Damaged and hostile input: one clear error each, no traceback, no hang, no code run, nothing outside touched.

    PYTHONPATH=tests python -m fuzz.run --mutations 10000 [--seed 0] [--only folders|configs] [--show]
    make fuzz

Each mutation damages a base or an adapter (see mutate.py), then inspects, merges and exports it, now and then through
the command line; every fifth damages an Axolotl config instead. Whatever happens must be success or one QALoraError of
one printable line, within seconds; folders are complete or absent; base, adapter and all around them stay as they are.
"""

import argparse
import collections
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from fuzz.mutate import mutate, mutated_value
from huggingface_hub import constants
from pydantic import ValidationError
from support.fabricate import make_adapter, make_base, make_tokenizer
from typer.testing import CliRunner

from qalora_plugin.commands.cli import app
from qalora_plugin.commands.inspecting import inspect
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.conversion.merging import is_merge_of, merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.axolotl.args import QALoraArgs
from qalora_plugin.integrations.axolotl.preflight import check_axolotl

PATIENCE = 20  # seconds for one call; the slowest honest one takes a tenth of one


class Hang(BaseException):
    pass


def stop(*_: object) -> None:
    raise Hang


def content(folder: Path) -> dict[str, object]:
    """Everything below, links as their targets."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = kind
    return found


class Fuzzer:
    """One place with an intact base, intact adapter, and a secret outside; counts what happens."""

    def __init__(self, place: Path, seed: int, show: bool = False):
        self.place, self.chance, self.show = place, random.Random(seed), show
        kinds = ({}, {"act_order": True, "shards": 2, "bias": True})
        self.intact = []
        for i, kind in enumerate(kinds):
            base = make_base(place / f"intact{i}", **kind)
            (base / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
            self.intact.append((base, make_adapter(base, place / f"adapter{i}", rank_pattern={"up_proj": 2})))
        once = merge(*self.intact[0], place / "intact2", progress=False, offsets="factored").folder
        self.intact.append((once, make_adapter(once, place / "adapter2")))
        tokenizer = make_tokenizer()  # a run's own: BOS, EOS and PAD have to be carried
        tokenizer.add_special_tokens({"eos_token": "~"})
        tokenizer.save_pretrained(self.intact[1][1])
        self.arena = place / "arena"
        self.counts: collections.Counter = collections.Counter()
        self.seen: collections.Counter = collections.Counter()

    def fault(self, kind: str, what: str, detail: str) -> None:
        self.counts[kind] += 1
        lines = detail.strip().splitlines()
        self.seen[f"{kind}: {' | '.join(lines[-3:])[:240]}"] += 1
        if self.show:
            print(f"--- {kind}: {what}\n{detail}")

    def call(self, what: str, function: Callable, *allowed: type[Exception]) -> bool:
        """Run one thing; True if it succeeded."""
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        heard = io.StringIO()
        try:
            with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
                function()
            return True
        except allowed:
            return False
        except QALoraError as error:
            if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > 3000:
                self.fault("unclear", what, str(error)[:2000])
            return False
        except Hang:
            self.fault("hang", what, traceback.format_exc())
            return False
        except BaseException:
            self.fault("traceback", what, traceback.format_exc())
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if "\x1b" in heard.getvalue():
                self.fault("escape sequence", what, repr(heard.getvalue())[:500])

    def folders(self) -> None:
        """One mutation of a base or adapter."""
        shutil.rmtree(self.arena, ignore_errors=True)
        base, adapter = self.arena / "base", self.arena / "adapter"
        for source, target in zip(self.chance.choice(self.intact), (base, adapter), strict=True):
            shutil.copytree(source, target)
        outside = self.arena / "outside"
        outside.mkdir()
        (outside / "secret.json").write_text('{"secret": "TOP"}')
        what = mutate(base, adapter, self.chance)
        before = content(self.arena)
        out = self.arena / "out"
        self.call(f"inspect: {what}", lambda: inspect(base).print())
        if self.chance.random() < 0.3:
            command = ["merge", "--base", base, "--adapter", adapter, "--out", out]
            self.call(f"command: {what}", lambda: self.command(list(map(str, command))))
        else:
            dtype = self.chance.choice(["float16", "float32"])
            merged = self.call(f"merge: {what}", lambda: merge(base, adapter, out, dtype, progress=False))
            if merged and not is_merge_of(out, base, adapter, dtype):
                self.fault("half", what, "the merged folder is not recognised")
        named = self.chance.choice([base, None])
        self.call(f"export: {what}", lambda: export_lora(adapter, self.arena / "lora", named))
        after = content(self.arena)
        new = {name for name in after if name not in before}
        if any(after.get(name) != value for name, value in before.items()):
            self.fault("changed", what, str([name for name, value in before.items() if after.get(name) != value]))
        if stray := [name for name in new if name.split("/")[0] not in ("out", "lora")]:
            self.fault("outside", what, str(stray))
        if any(isinstance(after[name], bytes) and b"TOP" in after[name] for name in new):
            self.fault("leaked", what, str(sorted(new)))
        if Path("OWNED").exists():
            Path("OWNED").unlink()
            self.fault("code run", what, "")
        for folder, last in ((out, "README.md"), (self.arena / "lora", "adapter_config.json")):
            if folder.exists() and not (folder / last).is_file():
                self.fault("half", what, str(sorted(path.name for path in folder.iterdir())))

    def command(self, arguments: list[str]) -> None:
        result = CliRunner().invoke(app, arguments)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        if result.exit_code not in (0, 1) or "Traceback" in result.output or "\x1b" in result.output:
            raise AssertionError(result.output)

    def configs(self) -> None:
        """One mutation of an Axolotl config, as the plugin sees it: raw, then through the schema."""
        intact = {
            "base_model": str(self.intact[0][0]), "adapter": "qalora", "lora_r": 8, "lora_alpha": 16,
            "lora_target_linear": True, "lora_target_modules": ["q_proj"], "plugins": ["qalora_plugin.QALoraPlugin"],
            "lora_exclude_modules": ["lm_head"], "bf16": False, "trl": {"use_vllm": False}, "rl": None,
            "qalora": {"merge": True, "merge_dir": None, "offset_dtype": "float16", "copy_base": False, "verify": True,
                       "verify_tokens": 64},
            "lora_model_dir": None, "revision_of_model": None, "output_dir": str(self.place / "run"),
        }  # fmt: skip
        mutated = mutated_value(intact, self.chance)
        if not isinstance(mutated, dict):
            return
        if mutated.get("adapter") == "qalora":
            self.call(f"config: {mutated!r}", lambda: check_axolotl(mutated))
        self.call(f"schema: {mutated!r}", lambda: QALoraArgs.model_validate(mutated), ValidationError)

    def run(self, mutations: int, only: str | None = None) -> None:
        for i in range(mutations):
            self.counts["mutations"] += 1
            self.configs() if (only or ("configs" if i % 5 == 4 else "folders")) == "configs" else self.folders()


FAULTS = ("traceback", "hang", "code run", "outside", "changed", "leaked", "half", "unclear", "escape sequence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["folders", "configs"])
    parser.add_argument("--show", action="store_true", help="print every fault as it is found")
    args = parser.parse_args()
    constants.HF_HUB_OFFLINE = True
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        fuzzer = Fuzzer(Path(place), args.seed, args.show)
        fuzzer.run(args.mutations, args.only)
    for what, count in fuzzer.seen.most_common(40):
        print(f"{count:5d} × {what}")
    print(f"{fuzzer.counts['mutations']} mutations: {', '.join(f'{fuzzer.counts[fault]} {fault}' for fault in FAULTS)}")
    sys.exit(any(fuzzer.counts[fault] for fault in FAULTS))


if __name__ == "__main__":
    main()
