"""Fine-tune a quantized base with the HF Trainer; the run ends with a merged checkpoint, proven.

    python examples/train_with_trainer.py ./my-gptq-base ./outputs --text notes.txt

Needs ``pip install ".[peft]" datasets``.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from qalora_plugin import QALoraMergeCallback, add_adapter, load_base


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a quantized base with the HF Trainer.")
    parser.add_argument("base", help="quantized base: folder or Hub id")
    parser.add_argument("out", help="folder for the run; the merged checkpoint is OUT/merged")
    parser.add_argument("--text", type=Path, help="text to train on, paragraphs apart by empty lines")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="as for a LoRA")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    text = args.text.read_text() if args.text else "\n\n".join(["QA-LoRA merges by one addition."] * 64)
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    dataset = Dataset.from_dict(dict(tokenizer(paragraphs, truncation=True, max_length=512)))

    model = add_adapter(
        load_base(args.base, dtype="auto"), r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"
    )
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        TrainingArguments(
            args.out, max_steps=args.steps, learning_rate=args.learning_rate, logging_steps=10, report_to=[]
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[QALoraMergeCallback(args.base, verify=True)],
    )
    trainer.train()
    print(f"serve it: vllm serve {args.out}/merged")


if __name__ == "__main__":
    main()
