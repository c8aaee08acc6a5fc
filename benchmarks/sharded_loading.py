"""What each of two processes holds while a packed base is loaded and shared out with FSDP2 (gloo, CPU).

    python benchmarks/sharded_loading.py --gigabytes 7      a Llama-shaped base of random codes; 12 GB of RAM

Anonymous memory above that of the imports: what files take in the page cache is not counted. Rank 0 reads the base, the
other holds shapes until it is sent its part (``cpu_ram_efficient_loading``). Nothing is trained.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from report import RESULTS, describe, print_table, short

ROOT = Path(__file__).resolve().parents[1]
GROUP_SIZE = 128
PACKED_LAYER = 106e6  # bytes of a layer of the 7B shape
RANKS = 2


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Peak(threading.Thread):
    """The most anonymous memory since it was started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.start()

    def run(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.01)


def rank(base: Path, out: Path) -> None:
    """One of the processes; leaves ``rank<i>.json``."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    import torch.distributed as dist
    from support.axolotl_process import use_gloo
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from qalora_plugin import QALoraMergeCallback, add_adapter, load_base

    torch.set_num_threads(1)
    use_gloo(sharded=True)
    options = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "cpu_ram_efficient_loading": True}
    arguments = TrainingArguments(
        str(out), max_steps=1, report_to=[], use_cpu=True, bf16=True, ddp_backend="gloo", fsdp=True, fsdp_config=options
    )
    imports, peak = anonymous(), Peak()
    model = add_adapter(load_base(base, dtype=torch.bfloat16), r=16, target_modules="all-linear")
    before = anonymous()

    class Report(TrainerCallback):
        """Written once the model is shared out, before the first step, where the process ends."""

        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            words = [parameter for name, parameter in model.named_parameters() if name.endswith(".words")]
            found = {
                "before sharding": before - imports,
                "peak": peak.bytes - imports,
                "after": anonymous() - imports,
                "packed bytes it keeps": sum(parameter.to_local().nbytes for parameter in words),
                "packed bytes of all": sum(parameter.numel() * parameter.itemsize for parameter in words),
            }
            (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
            dist.barrier()
            os._exit(0)

    rows = [{"input_ids": list(range(4, 40)), "labels": list(range(4, 40))}] * 8
    Trainer(model, arguments, train_dataset=rows, callbacks=[QALoraMergeCallback(base), Report()]).train()


def measure(gigabytes: float, work: Path, out: Path) -> None:
    import models

    models.SHAPES["7b"]["num_hidden_layers"] = max(1, round(gigabytes * 1e9 / PACKED_LAYER))
    base = models.write_base(work / f"{gigabytes:g}-gb", "7b", GROUP_SIZE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS), __file__]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_FSDP": "true"}
    subprocess.run([*command, "--rank-of", base, "--work", work], check=True, env=environment)
    found = [json.loads((work / f"rank{i}.json").read_text()) for i in range(RANKS)]
    print_table(["MB", "rank 0", "rank 1"], [[name, *(f"{r[name] / 1e6:.0f}" for r in found)] for name in found[0]])
    with (out / "sharded_loading.csv").open("w", newline="") as file:
        rows = [{"rank": i} | {name: short(value) for name, value in one.items()} for i, one in enumerate(found)]
        rows = [row | describe("transformers", "accelerate") for row in rows]
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=7, help="of the packed base")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "sharded_loading", help="where the base goes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of sharded_loading.csv")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)  # the base, in one of the processes
    args = parser.parse_args()
    if args.rank_of:
        rank(args.rank_of, args.work)
    else:
        measure(args.gigabytes, args.work.absolute(), args.out)


if __name__ == "__main__":
    main()
