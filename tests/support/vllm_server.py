"""A real `vllm serve` process over HTTP, from the environment that has vLLM. Used by tests of both environments."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

START_SECONDS = 300
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
SMALL = ("--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager")


class Server:
    """`vllm serve FOLDER`, with no flag about quantisation. A context manager: up inside, stopped after.

    Args:
        environment: folder of the virtual environment that has vLLM.
        folder: the merged checkpoint.
        log: file for the server's output.
        options: further flags. ranks: tensor-parallel size. stages: pipeline-parallel size.
    """

    def __init__(self, environment: Path, folder: Path, log: Path, *options: str, ranks: int = 1, stages: int = 1):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.command = [environment / "bin" / "vllm", "serve", folder, "--served-model-name", "merged"]
        self.command += ["--host", "127.0.0.1", "--port", str(port)]
        self.command += ["--tensor-parallel-size", str(ranks), "--pipeline-parallel-size", str(stages)]
        self.command = [str(part) for part in (*self.command, *SMALL, *options)]
        self.environment = {**os.environ, **ENVIRONMENT}
        if ranks * stages > 1:
            self.environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks * stages)))

    def __enter__(self) -> "Server":
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, env=self.environment, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise AssertionError(f"the server did not start:\n{self.log.read_text()[-6000:]}")

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def complete(self, prompt: list[int] | str, length: int, model: str = "merged") -> tuple[list[int], list[float]]:
        """Greedy completion: token ids and their log-probabilities. model: "merged", or the name of a LoRA module."""
        answer = self._post({"model": model, "prompt": prompt, "max_tokens": length, "ignore_eos": True})
        return [int(token.removeprefix("token_id:")) for token in answer["tokens"]], answer["token_logprobs"]

    def score(self, tokens: list[int]) -> list[float]:
        """Log-probability of each token but the first, given those before it."""
        return self._post({"model": "merged", "prompt": tokens, "max_tokens": 1, "echo": True})["token_logprobs"][1:-1]

    def metric(self, name: str) -> float:
        """Sum of the counter ``vllm:<name>_total``."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}_total"))

    def _post(self, body: dict) -> dict:
        body |= {"temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["logprobs"]
