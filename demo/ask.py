"""Stages 4 and 8: serve a model with vLLM, ask it through the openai client for documentation, stop the server again.

Before tuning that is the INT4 base, after it the merged folder: the same server, the same questions. One question is
about a function written for this demo; its answers are what the demo shows. The others are the held-out functions.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import torch
from task import LONGEST_ANSWER, SHOWN, question, score
from transformers import AutoModelForCausalLM

import qalora_plugin  # noqa: F401 (transformers then loads merged checkpoints)

START_LIMIT = 600  # seconds; a first start on a CPU compiles and imports for about one minute
STOP_LIMIT = 15
AT_ONCE = 8
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
CPU_ARGUMENTS = ["--max-model-len", "512", "--max-num-seqs", str(AT_ONCE), "--enforce-eager"]


@contextmanager
def server(model: Path, arguments: list[str]) -> Iterator[openai.OpenAI]:
    """A client of a vLLM server of ``model``; nothing of the server is left afterwards, whatever happens.

    Raises:
        RuntimeError: it ended, or did not come up in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    vllm = Path(sys.executable).with_name("vllm")
    command = [vllm, "serve", model, "--host", "127.0.0.1", "--port", str(port), *arguments]
    on_cpu = not torch.cuda.is_available()
    process = subprocess.Popen(
        command + (CPU_ARGUMENTS if on_cpu else []), env=os.environ | (CPU_ENVIRONMENT if on_cpu else {})
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
        wait_until_ready(client, process)
        yield client
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_ready(client: openai.OpenAI, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with exit status {process.returncode} before it was up")
        try:
            client.with_options(max_retries=0).models.list()
            return
        except openai.APIConnectionError:
            time.sleep(0.5)
    raise RuntimeError(f"vLLM was not up after {START_LIMIT} s")


def ask(client: openai.OpenAI, model: Path, messages: list[dict[str, str]]) -> openai.types.chat.ChatCompletion:
    """The greedy answer, with token ids and log-probabilities."""
    return client.chat.completions.create(
        model=str(model),
        messages=messages,
        temperature=0,
        max_tokens=LONGEST_ANSWER,
        logprobs=True,
        extra_body={"return_token_ids": True},
    )


@torch.inference_mode()
def logprob_difference(model: Path, completion: openai.types.chat.ChatCompletion) -> float:
    """Largest |log p of vLLM − log p of transformers in float32| over the answer's tokens."""
    choice, prompt = completion.choices[0], completion.prompt_token_ids
    tokens = torch.tensor(choice.token_ids)
    served = torch.tensor([token.logprob for token in choice.logprobs.content])
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logits = loaded(torch.tensor([[*prompt, *choice.token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return (served - expected).abs().max().item()


def main(model: Path, rows: Path, out: Path, compare: bool, arguments: list[str]) -> None:
    held_out = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    started = time.monotonic()
    with server(model, arguments) as client, ThreadPoolExecutor(AT_ONCE) as threads:
        ready = time.monotonic() - started
        shown = ask(client, model, question(SHOWN))
        answers = list(threads.map(lambda messages: ask(client, model, messages[:-1]), held_out))
    scores = [
        score(answer.choices[0].message.content, messages[-1]["content"])
        for answer, messages in zip(answers, held_out, strict=True)
    ]
    report = {
        "question": question(SHOWN)[0]["content"],
        "answer": shown.choices[0].message.content,
        "cut_short": shown.choices[0].finish_reason == "length",
        "asked": len(scores),
        "right": {line: sum(one[line] for one in scores) for line in scores[0]},
        "seconds_until_ready": round(ready, 1),
    }
    if compare:
        report["logprob_difference"] = logprob_difference(model, shown)
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(report["answer"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path, help="held-out examples")
    parser.add_argument("out", type=Path, help="new JSON file")
    parser.add_argument("--compare", action="store_true", help="the log-probabilities with those of transformers")
    known, others = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped on the way out
    main(**vars(known), arguments=others)
