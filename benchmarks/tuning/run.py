"""Takes jobs of the accuracy table that nobody has yet, runs them, and appends what they found as JSON lines.

Several such processes may work side by side on one folder.
"""

import argparse
import dataclasses
import fcntl
import gc
import json
import math
import shutil
import subprocess
import time
from pathlib import Path
from typing import TextIO

import torch
from report import describe
from transformers import AutoTokenizer, set_seed
from tuning import plan, rows
from tuning.jobs import BATCH, HEALED, LONGEST, QUANTIZE, REQUANTIZE, STEPS, TESTED, Job, job_of
from tuning.methods import METHODS, Places, build_lora, build_scales, merge_lora, merged, untuned
from tuning.training import train

from qalora_plugin import load_base
from qalora_plugin.eval.evaluate import mean_loss

KEPT = ("lora", "scales")  # whose adapters are quantized, or asked questions, afterwards
WAIT = 2.0  # seconds, where what a job needs is being made
MEASURED_AT_ONCE = 8192  # tokens


class Bench:
    """What all jobs of a process share.

    Args:
        data: from :func:`tuning.data.prepare`. work: where results and adapters are written, and who took what.
        quantizer: Python of the environment with GPTQModel. limit: steps and rows of a rehearsal; None: all.
    """

    def __init__(self, data: Path, work: Path, device: str, quantizer: str, limit: int | None):
        self.data, self.work, self.device, self.quantizer, self.limit = data, work, device, quantizer, limit
        self.results, self.taken = work / "results.jsonl", work / "taken"
        self.taken.mkdir(parents=True, exist_ok=True)
        self.marks: list[TextIO] = []  # open, and locked
        self.tokenizer = AutoTokenizer.from_pretrained(data / "model")
        self.about = describe("transformers", "peft", "gptqmodel")

    def next_job(self, only: str) -> Job | bool | None:
        """A job that is this process's now; True: some wait for what others make; None: nothing is left."""
        results = plan.read(self.results)
        failed = {job_of(row).name for row in results if plan.failed(row)}
        done = {job_of(row).name for row in results} - failed
        left = [job for job in plan.jobs(results) if job.name not in done | failed]
        wanted = {name for job in left if only in job.name for name in (job.name, job.needs)}
        waiting = False
        for job in (job for job in left if job.name in wanted):
            if job.needs and job.needs not in done:
                waiting = waiting or job.needs not in failed
                continue
            if not self.take(job.name):
                waiting = True
                continue
            if job.name in {job_of(row).name for row in plan.read(self.results)}:  # done since we looked
                continue
            return job
        return waiting or None

    def take(self, name: str) -> bool:
        """Whether a job is this process's now, for as long as it lives; else another's, that lives."""
        mark = (self.taken / name).open("w")
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mark.close()
            return False
        self.marks.append(mark)
        return True

    def do(self, job: Job) -> dict[str, object]:
        """What a job found."""
        if job.method == QUANTIZE:
            base = self.data / "bases" / job.base
            return {} if base.is_dir() else self.quantize(self.data / "model", base, job)
        adapter, folder = self.work / "adapters" / job.name, self.work / "merged" / job.name
        places = Places(self.data, self.data / "bases", adapter, folder, self.device)
        for folder in (places.adapter, places.merged):
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
        set_seed(job.seed)
        if job.method == REQUANTIZE:
            with (self.taken / f"{job.needs}.again").open("w") as mark:
                fcntl.flock(mark, fcntl.LOCK_EX)
                if not (self.work / "adapters" / job.needs / "adapter_config.json").is_file():  # PEFT writes it last
                    self.do(job.lora)  # its loss was found on another machine
            made = self.work / "requantized" / job.name
            shutil.rmtree(made, ignore_errors=True)  # of a run that was stopped
            found = self.quantize(merge_lora(self.work / "adapters" / job.needs, places), made, job)
            found |= self.measure(load_base(made, dtype=torch.float32, device_map=self.device), job)
            shutil.rmtree(made)
        elif job.method == HEALED:
            found = self.heal(job, places)
        elif job.method not in METHODS:
            found = self.measure(untuned(job, places), job)
        else:
            build, finish = METHODS[job.method]
            model = build(job, places)
            found = self.train(model, job, self.batches(job))
            found |= self.measure(finish(model, job, places), job)
        for folder in (places.merged, *([] if job.method in KEPT else [places.adapter])):
            shutil.rmtree(folder, ignore_errors=True)
        return found

    def heal(self, job: Job, places: Places) -> dict[str, object]:
        """One run in two halves: what the second trains on is quantized from what the first made."""
        batches = self.batches(job)
        half = len(batches) // 2
        model = build_lora(job, places)
        self.train(model, job, batches[:half])
        model.save_pretrained(places.adapter)
        healed = dataclasses.replace(places, bases=self.work / "requantized" / job.name)
        shutil.rmtree(healed.bases, ignore_errors=True)
        found = self.quantize(merge_lora(places.adapter, places), healed.base(job), job)
        for folder in (places.adapter, places.merged):
            shutil.rmtree(folder)
        model = build_scales(job, healed)
        found |= self.train(model, job, batches[half:])
        found |= self.measure(merged(model, job, healed), job) | {"steps": len(batches)}
        shutil.rmtree(healed.bases)
        return found

    def train(self, model: torch.nn.Module, job: Job, batches: list) -> dict[str, object]:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return {"trained": trained} | train(model, job, batches, self.work / "trainer", self.device)

    def batches(self, job: Job) -> list:
        examples = rows.read(self.data / job.task / "train.jsonl", self.tokenizer, LONGEST)
        if self.limit:
            examples = [example for example in examples if len(example.ids) < LONGEST // 2]
        return rows.batches(examples, 2 if self.limit else BATCH, self.limit or STEPS, job.seed)

    def measure(self, model: torch.nn.Module, job: Job) -> dict[str, object]:
        """Held-out loss and top-1 of the task, and the loss on prose."""
        tested = rows.read(self.data / job.task / "test.jsonl", self.tokenizer, LONGEST)[: self.limit or TESTED]
        prose = rows.prose(self.data / "prose.txt", self.tokenizer)[: self.limit]
        found = mean_loss(model, tested, batch=MEASURED_AT_ONCE)
        forgetting = mean_loss(model, prose, batch=MEASURED_AT_ONCE)
        if not math.isfinite(found.loss) or not math.isfinite(forgetting.loss):
            raise ArithmeticError(f"the loss is {found.loss} on the task, {forgetting.loss} on prose: it diverged")
        return {"loss": found.loss, "top1": found.top1, "prose": forgetting.loss}

    def quantize(self, model: Path, out: Path, job: Job) -> dict[str, object]:
        out.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        command = [self.quantizer, "-m", "tuning.quantize", model, out, self.data / "calibration.jsonl"]
        command += [job.bits, job.group_size, int(job.clip), int(job.gptaq), self.limit or 0]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(f"quantizing failed: {done.stderr[-600:]}")
        return {"quantize_seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quantizer", required=True, help="Python of the environment with GPTQModel")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="take no new job after so many")
    parser.add_argument("--only", default="", help="only jobs whose name has this in it, and what they need")
    parser.add_argument("--limit", type=int, help="steps and rows, for a rehearsal")
    args = parser.parse_args()
    bench = Bench(args.data.absolute(), args.work.absolute(), args.device, args.quantizer, args.limit)
    started = time.monotonic()
    while time.monotonic() - started < args.seconds:
        job = bench.next_job(args.only)
        if job is None:
            break
        if not isinstance(job, Job):
            time.sleep(WAIT)
            continue
        begun = time.monotonic()
        try:
            found = bench.do(job)
        except Exception as error:  # a row that says so; the other jobs go on
            found = {"note": f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"}
        found["seconds"] = time.monotonic() - begun
        with bench.results.open("a") as file:
            file.write(json.dumps(vars(job) | found | bench.about) + "\n")
        print(f"{time.monotonic() - started:5.0f} s", job.name, json.dumps(found), flush=True)
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
