"""One served model in a process of its own, driven line by line: JSON orders on stdin, JSON answers on stdout.

{"do": "serve", "concurrency": 8}  →  {"tokens_per_s": …, "ttft_ms": …}      that many requests at once
{"do": "load"}                     →  {"load_s": …}                          the model once more: read, place, repack
"""

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
from serving_models import RANK
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader import get_model


class Worker:
    """Args: model, lora: folders. prompt, output: tokens of every request."""

    def __init__(self, model: str, lora: str | None, prompt: int, output: int, most: int, **kwargs):
        lora_options = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 1} if lora else {}
        self.llm = LLM(
            model, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=prompt + output, max_num_seqs=most,
            enable_prefix_caching=False, disable_log_stats=False, **lora_options, **kwargs,
        )  # fmt: skip
        self.request = LoRARequest("tuned", 1, lora) if lora else None
        self.vocabulary = self.llm.llm_engine.vllm_config.model_config.get_vocab_size()
        self.prompt, self.output = prompt, output

    def serve(self, concurrency: int) -> dict[str, float]:
        tokens = torch.randint(10, self.vocabulary, (concurrency, self.prompt)).tolist()
        sampling = SamplingParams(max_tokens=self.output, ignore_eos=True, temperature=0, detokenize=False)
        start = time.perf_counter()
        answers = self.llm.generate(
            [{"prompt_token_ids": row} for row in tokens], sampling, use_tqdm=False, lora_request=self.request
        )
        seconds = time.perf_counter() - start
        first = statistics.median(answer.metrics.first_token_latency for answer in answers)
        return {"tokens_per_s": concurrency * self.output / seconds, "ttft_ms": 1e3 * first}

    def load(self) -> dict[str, float]:
        config = self.llm.llm_engine.vllm_config
        names = config.compilation_config.static_forward_context  # every layer enters its name, and but once
        entered = dict(names)
        names.clear()
        start = time.perf_counter()
        with set_current_vllm_config(config):
            get_model(vllm_config=config)
        seconds = time.perf_counter() - start
        names.clear()
        names.update(entered)
        return {"load_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--lora")
    for name in ("prompt", "output", "most"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    arguments = vars(parser.parse_args())
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # vLLM prints to stdout, too: that goes to stderr
    os.dup2(2, 1)
    worker = Worker(**arguments.pop("options"), **arguments)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(worker, order.pop("do"))(**order)), file=answers)


if __name__ == "__main__":
    main()
