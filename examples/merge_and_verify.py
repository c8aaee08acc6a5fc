"""Merge an adapter into its base and prove it, from Python: what ``qalora merge --verify`` does.

python examples/merge_and_verify.py ./my-gptq-base ./outputs ./merged
"""

import argparse
import sys
from pathlib import Path

from qalora_plugin import QALoraError, merge, verify


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge an adapter into its base and prove it.")
    parser.add_argument("base", help="the base that the adapter was trained on: folder or Hub id")
    parser.add_argument("adapter", type=Path, help="folder of the trained adapter")
    parser.add_argument("out", type=Path, help="new folder for the merged checkpoint")
    parser.add_argument("--tokens", type=int, default=2048, help="how many tokens to compare logits on")
    args = parser.parse_args()

    try:
        made = merge(args.base, args.adapter, args.out)
        print(f"{made.modules} linears merged into {made.folder}, {made.new_bytes / 1e6:.1f} MB new")
        report = verify(args.base, args.adapter, made.folder, max_tokens=args.tokens)
    except QALoraError as error:  # one line: what was found, what was expected, what to do
        sys.exit(f"error: {error}")
    report.print()
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
