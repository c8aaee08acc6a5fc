"""Merges that are killed and merges that race: whatever happens, a folder is complete or absent.

    python tests/stress.py --kills 500 --races 2000

Kills: a merge is killed at a random moment. Races: four merges of four adapters start for one name at once, some
are killed. After each, the folder must be absent or, byte for byte, one of the four merges made in peace; nothing else
in the place may have changed; and a merge in peace at the end must leave no work folder behind. Exit status 1 if not.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError

RACERS = 4
PREPARE = """
import sys; from pathlib import Path; from support.fabricate import make_adapter, make_base
place = Path(sys.argv[1]); base = make_base(place / "base", shards=2)
for i in range(int(sys.argv[2])): make_adapter(base, place / f"adapter{i}", seed=i)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Arena:
    """A base, adapters, the merges they should give, a folder that is nobody's business, and links planted to it."""

    def __init__(self, place: Path):
        environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
        subprocess.run([sys.executable, "-c", PREPARE, place, str(RACERS)], check=True, env=environment)
        self.place, self.base = place / "work", place / "base"
        self.adapters = [place / f"adapter{i}" for i in range(RACERS)]
        self.whole = []
        for i, adapter in enumerate(self.adapters):
            self.whole.append(content(merge(self.base, adapter, place / str(i) / "out", progress=False).folder))
        self.stranger = self.place / "stranger"
        self.stranger.mkdir(parents=True)
        (self.stranger / "thesis.txt").write_text("mine")
        for name in (".out.partial", ".out.partial-planted0"):
            (self.place / name).symlink_to(self.stranger)
        self.out = self.place / "out"
        self.around = {path.name for path in self.place.iterdir()}

    def start(self, racer: int) -> int:
        """A merge in a process of its own: its id."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
            merge(self.base, self.adapters[racer], self.out, progress=False)
            code = 0
        except QALoraError as error:
            code = 3 if "another process" in str(error) or "exists" in str(error) else 1
            if code == 1:
                print(error, file=sys.stderr)
        finally:
            os._exit(code)

    def judge(self, counts: dict[str, int]) -> None:
        """Count what is under the name, and remove it."""
        if self.out.exists():
            found = content(self.out)
            if found in self.whole:
                counts["whole"] += 1
            elif all(any(found.get(name) == one.get(name) for one in self.whole) for name in self.whole[0]):
                counts["mixed"] += 1
            else:
                counts["half"] += 1
            shutil.rmtree(self.out)
        else:
            counts["absent"] += 1
        if content(self.stranger) != {"thesis.txt": b"mine"}:
            counts["foreign"] += 1
            (self.stranger / "thesis.txt").write_text("mine")

    def leftovers(self) -> int:
        """Work folders that are still there after a merge in peace."""
        merge(self.base, self.adapters[0], self.out, progress=False)
        shutil.rmtree(self.out)
        return len({path.name for path in self.place.iterdir()} - self.around)


def kills(arena: Arena, number: int, chance: random.Random, code: int = signal.SIGKILL) -> dict[str, int]:
    counts = dict.fromkeys(("whole", "absent", "half", "mixed", "foreign"), 0)
    started = time.perf_counter()
    os.waitpid(arena.start(0), 0)
    length = time.perf_counter() - started
    shutil.rmtree(arena.out)
    for i in range(number):
        child = arena.start(i % RACERS)
        time.sleep(chance.uniform(0, 1.2 * length))
        os.kill(child, code)
        os.waitpid(child, 0)
        arena.judge(counts)
    return counts


def races(arena: Arena, number: int, chance: random.Random) -> dict[str, int]:
    counts = dict.fromkeys(("whole", "absent", "half", "mixed", "foreign", "errors"), 0)
    for i in range(number):
        children = [arena.start(racer) for racer in range(RACERS)]
        killed = children[i % RACERS] if i % 5 == 4 else None
        if killed:
            time.sleep(chance.uniform(0, 0.03))
            os.kill(killed, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        counts["errors"] += sum(code not in (0, 3, -signal.SIGKILL) for code in codes)
        counts["errors"] += codes.count(0) > 1 or (killed is None and codes.count(0) != 1)
        arena.judge(counts)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--races", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        arena, chance = Arena(Path(place)), random.Random(args.seed)
        failed = False
        for name, counts in (
            ("killed (SIGKILL)", kills(arena, args.kills, chance)),
            ("raced", races(arena, args.races, chance)),
        ):
            counts["left over"] = arena.leftovers()
            print(f"{name}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
            failed |= any(counts.get(what) for what in ("half", "mixed", "foreign", "errors", "left over"))
        for code in (signal.SIGTERM, signal.SIGHUP):
            counts = kills(arena, max(1, args.kills // 10), chance, code)
            counts["left over"] = len({path.name for path in arena.place.iterdir()} - arena.around)
            print(f"{code.name}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
            failed |= any(counts[what] for what in ("half", "mixed", "foreign", "left over"))
    sys.exit(failed)


if __name__ == "__main__":
    main()
