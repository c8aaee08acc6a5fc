"""Log-probabilities by vLLM, in process."""

import torch
from vllm import LLM, SamplingParams

OPTIONS = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "enable_prefix_caching": False}


def scores(llm: LLM, tokens: torch.Tensor) -> torch.Tensor:
    prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    return torch.tensor(
        [
            [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], row[1:], strict=True)]
            for output, row in zip(outputs, tokens.tolist(), strict=True)
        ]
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()
