"""Draws a results file of ``train_step.py``: ``python benchmarks/plot.py benchmarks/results/train_step_cpu.csv``."""

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(path: Path) -> Path:
    """Bars of tokens/s and of peak memory, scenario by scenario. Returns the image beside ``path``."""
    rows = list(csv.DictReader(path.open()))
    scenarios, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("scenario", "method"))
    figure, axes = plt.subplots(2, 1, figsize=(1.5 + 2.2 * len(scenarios), 6), sharex=True)
    for axis, key, title in zip(axes, ("tokens_per_second", "peak_mb"), ("tokens/s", "peak memory, MB"), strict=True):
        for i, method in enumerate(methods):
            values = {row["scenario"]: float(row[key]) for row in rows if row["method"] == method}
            places = [x + (i - len(methods) / 2 + 0.5) * 0.8 / len(methods) for x in range(len(scenarios))]
            axis.bar(places, [values[name] for name in scenarios], 0.75 / len(methods), label=method)
        axis.set_ylabel(title)
    axes[0].legend(ncols=len(methods), fontsize="small", loc="lower right")
    axes[0].set_title(f"training step: {rows[0]['shape']}, {rows[0]['machine']}", fontsize="medium")
    axes[1].set_xticks(range(len(scenarios)), scenarios, fontsize="small")
    figure.tight_layout()
    figure.savefig(image := path.with_suffix(".png"), dpi=120)
    return image


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
