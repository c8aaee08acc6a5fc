"""Run a merged checkpoint in vLLM, without a server: no flag, vLLM's own INT4 kernels. Run it where vLLM is.

python examples/serve_offline.py ./outputs/merged "What is QA-LoRA?" "And LoRA?"
"""

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a merged checkpoint in vLLM.")
    parser.add_argument("merged", help="folder of a merged checkpoint")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, help="tokens of a prompt and its answer; default: the model's")
    args = parser.parse_args()

    model = LLM(args.merged, max_model_len=args.max_model_len)
    for answer in model.generate(args.prompts, SamplingParams(temperature=0, max_tokens=args.tokens)):
        print(answer.prompt, answer.outputs[0].text, sep=" → ")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
