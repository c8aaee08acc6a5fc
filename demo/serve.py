"""Stage 7: serve the merged model with vLLM, ask it for one held-out summary, and stop the server again.

The log-probabilities that vLLM reports for its own tokens are compared with those of transformers on the same folder.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import qalora_plugin  # noqa: F401 (transformers then loads merged checkpoints)

START_LIMIT = 600  # seconds; a first start on a CPU compiles and imports for about one minute
STOP_LIMIT = 15
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
CPU_ARGUMENTS = ["--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]


@contextmanager
def server(environment: Path, merged: Path) -> Iterator[str]:
    """The address of a vLLM server of ``merged``; nothing of it is left afterwards, whatever happens.

    Raises:
        RuntimeError: it ended, or did not come up in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [environment / "bin" / "vllm", "serve", merged, "--host", "127.0.0.1", "--port", str(port)]
    on_cpu = not torch.cuda.is_available()
    process = subprocess.Popen(
        command + (CPU_ARGUMENTS if on_cpu else []), env=os.environ | (CPU_ENVIRONMENT if on_cpu else {})
    )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(address, process)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_until_healthy(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with exit status {process.returncode} before it was up")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"vLLM was not up after {START_LIMIT} s")


def complete(address: str, model: str, prompt: str) -> dict:
    """The greedy completion of a prompt, with token ids and log-probabilities."""
    body = {
        "model": model,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 40,
        "logprobs": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)["choices"][0]


@torch.inference_mode()
def logprob_difference(merged: Path, choice: dict) -> float:
    """Largest |log p of vLLM − log p of transformers| over the completion's tokens."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    prompt, completion = choice["prompt_token_ids"], torch.tensor(choice["token_ids"])
    logits = model(torch.tensor([prompt + choice["token_ids"]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
    return (torch.tensor(choice["logprobs"]["token_logprobs"]) - expected).abs().max().item()


def main(environment: Path, corpus: Path, merged: Path, out: Path) -> None:
    first = json.loads((corpus / "test.jsonl").read_text(encoding="utf-8").partition("\n")[0])
    special = json.loads((corpus / "tokenizer" / "tokenizer_config.json").read_text())
    prompt, written = (segment["text"] for segment in first["segments"])
    prompt = prompt.removeprefix(special["bos_token"])  # which the tokenizer adds
    started = time.monotonic()
    with server(environment, merged) as address:
        ready = time.monotonic() - started
        choice = complete(address, str(merged), prompt)
    report = {
        "prompt": prompt,
        "completion": choice["text"].strip(),
        "written_by_the_author": written.removesuffix(special["eos_token"]).strip(),
        "seconds_until_ready": round(ready, 1),
        "logprob_difference": logprob_difference(merged, choice),
    }
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(report["completion"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("environment", type=Path, help="virtual environment that holds vLLM")
    for name in ("corpus", "merged"):
        parser.add_argument(name, type=Path)
    parser.add_argument("out", type=Path, help="new JSON file")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped on the way out
    main(**vars(parser.parse_args()))
