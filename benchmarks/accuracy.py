"""The accuracy table: every method, tuned on two tasks, on a whole real model, at equal served bits.

    .venv/bin/python benchmarks/accuracy.py                     all of it: hours on a GPU, days on a CPU
    .venv/bin/python benchmarks/accuracy.py --workers 8         runs side by side, on a GPU with the memory for it
    .venv/bin/python benchmarks/accuracy.py --only lora-gptq    runs whose name has this in it
    .venv/bin/python benchmarks/accuracy.py --summary           only the table of what has been run

What was run is never run again: stop it, and call it again to go on. Nor is what stands in ``accuracy.csv`` of
``--out``: a table is added to from any machine; for one of your own, name another folder. What failed is tried again.
A rehearsal has places of its own. SmolLM2-135M-Instruct comes out of its wheel; gsm8k from the Hub, or from
``--gsm8k FOLDER`` with ``gsm8k_train.jsonl`` and ``gsm8k_test.jsonl``.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from report import RESULTS
from tuning import plan, summary
from tuning.data import prepare
from tuning.jobs import job_of

ROOT = Path(__file__).resolve().parents[1]


def known(args: argparse.Namespace) -> list[dict]:
    """What was run, here or elsewhere: of each job the last row, if it ever did not fail one that did not."""
    before = args.out / "accuracy.csv"
    rows = [*(summary.read_csv(before) if before.is_file() else ()), *plan.read(args.work / "runs" / "results.jsonl")]
    found: dict[str, dict] = {}
    for row in rows:
        if not (plan.failed(row) and job_of(row).name in found):
            found[job_of(row).name] = row
    return list(found.values())


def run(args: argparse.Namespace) -> None:
    """Workers on all jobs that are left, until there are none."""
    plan.write(args.work / "runs" / "results.jsonl", [row for row in known(args) if not plan.failed(row)])
    command = [sys.executable, "-m", "tuning.run", "--data", args.work, "--work", args.work / "runs"]
    command += ["--quantizer", args.quantizer.absolute(), "--only", args.only, "--seconds", args.seconds]
    command += ["--limit", args.limit] if args.limit else []
    workers = [subprocess.Popen([str(part) for part in command], cwd=ROOT / "benchmarks") for _ in range(args.workers)]
    try:
        if failed := [worker.returncode for worker in workers if worker.wait()]:
            raise SystemExit(f"{len(failed)} of {len(workers)} workers failed; what was found is kept.")
    finally:
        for worker in workers:
            worker.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "accuracy", help="%(default)s")
    parser.add_argument("--out", type=Path, help=f"folder of accuracy.csv and accuracy.png; default: {RESULTS}")
    parser.add_argument("--gsm8k", type=Path, help="folder of its two files; default: from the Hub")
    parser.add_argument(
        "--quantizer", type=Path, default=ROOT / ".venv-serve" / "bin" / "python", help="with GPTQModel"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="take no new job after so many")
    parser.add_argument("--limit", type=int, help="steps and rows, for a rehearsal, in WORK/rehearsal")
    parser.add_argument("--summary", action="store_true", help="run nothing")
    args = parser.parse_args()
    args.work = args.work.absolute() / ("rehearsal" if args.limit else "")
    args.out = args.out or (args.work if args.limit else RESULTS)
    if not args.summary:
        prepare(args.work, args.gsm8k)
        run(args)
    rows = summary.with_bits(known(args), args.work / "model")
    if not rows:
        raise SystemExit(f"{args.work} holds no results. Leave --summary out to run the jobs.")
    args.out.mkdir(parents=True, exist_ok=True)
    found = summary.cells(rows)
    summary.write_csv(rows, args.out / "accuracy.csv")
    if found:
        summary.plot(found, args.out / "accuracy.png")
    print(summary.markdown(found))
    if failures := [f"{job_of(row).name}: {row['note']}" for row in rows if plan.failed(row)]:
        raise SystemExit("These failed, and what needs them was left out:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
