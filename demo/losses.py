"""Stage 7: the held-out loss of the task for all four models: what the adapter learned, and that the merge keeps it.

Only the tokens of the answer count, in the model's chat template, as in training. Float32, so that differences are the
models' own. (``qalora eval`` shows the same and more.)
"""

import argparse
import json
from pathlib import Path

import torch

from qalora_plugin.eval.evaluate import mean_loss
from qalora_plugin.eval.examples import as_examples, read_rows
from qalora_plugin.eval.models import Subject


def main(rows: Path, model: Path, base: Path, adapter: Path, merged: Path, out: Path) -> None:
    models = {
        "model": Subject.open(str(model)),
        "base": Subject.open(str(base)),
        "adapter": Subject.open(str(base), str(adapter)),
        "merged": Subject.open(str(merged)),
    }
    examples, _ = as_examples(read_rows(rows), models["model"].tokenizer)
    losses = {}
    for name, subject in models.items():
        with subject.loaded(torch.float32, "cuda" if torch.cuda.is_available() else "cpu") as loaded:
            losses[name] = mean_loss(loaded, examples).loss
        print(f"{name}: held-out loss {losses[name]:.6f}", flush=True)
    out.write_text(json.dumps(losses, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, help="the held-out examples")
    for name in ("model", "base", "adapter", "merged"):
        parser.add_argument(name, type=Path)
    parser.add_argument("out", type=Path, help="new JSON file")
    main(**vars(parser.parse_args()))
