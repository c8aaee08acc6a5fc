"""Run a merged checkpoint in transformers: no import of ours, where this package is installed.

python examples/generate.py ./outputs/merged "What is QA-LoRA?"
"""

import argparse

from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a merged checkpoint in transformers.")
    parser.add_argument("merged", help="folder of a merged checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()

    generate = pipeline("text-generation", args.merged)
    print(generate(args.prompt, max_new_tokens=args.tokens, do_sample=False)[0]["generated_text"])


if __name__ == "__main__":
    main()
