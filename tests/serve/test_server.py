"""A real HTTP server on a merged folder, with no flag about quantisation, on one rank and on two."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from serve.checkpoints import make_merged
from serve.scoring import MEAN_TOLERANCE, random_tokens, score

pytestmark = pytest.mark.e2e
START_SECONDS = 240
CASES = {
    "one rank": (1, {"group_size": 32}),
    # down_proj (K = 512) has a group on each rank; o_proj (K = 256) is one group, kept whole by both
    "two ranks": (2, {"group_size": 256}),
}


class Server:
    """`python -m vllm.entrypoints.openai.api_server`: what `vllm serve` runs, without needing the name ``vllm`` on disk
    (CPU builds are distributed under another)."""

    def __init__(self, folder, ranks: int, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--served-model-name", "merged", "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
        command += ["--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager"]
        command += ["--tensor-parallel-size", str(ranks)]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        if ranks > 1:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def complete(self, prompt: list[int], length: int) -> dict:
        body = {"model": "merged", "prompt": prompt, "max_tokens": length, "temperature": 0, "logprobs": 1}
        body |= {"return_tokens_as_token_ids": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["logprobs"]

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.mark.parametrize("case", list(CASES))
def test_completions_have_the_log_probabilities_of_transformers(tmp_path, case):
    ranks, kwargs = CASES[case]
    folder = make_merged(tmp_path, **kwargs)
    server = Server(folder, ranks, tmp_path / "server.log")
    try:
        server.wait_until_up()
        answers = [server.complete(prompt, 60) for prompt in random_tokens(4, 20).tolist()]
    finally:
        server.stop()
    generated = torch.tensor([[int(t.removeprefix("token_id:")) for t in answer["tokens"]] for answer in answers])
    found = torch.tensor([answer["token_logprobs"] for answer in answers])
    tokens = torch.cat([random_tokens(4, 20), generated], dim=1)
    wanted, base = (score(folder, tokens, torch.bfloat16, with_offsets)[:, 19:] for with_offsets in (True, False))
    tolerance = MEAN_TOLERANCE[torch.bfloat16]
    assert (wanted - base).abs().mean() > 4 * tolerance
    assert (found - wanted).abs().mean() <= tolerance
    assert "qalora: CPUWNA16LinearKernel" in server.log.read_text()
