"""Stage 2 where SmolLM2 cannot be had: a small Llama from scratch, with its tokenizer. Some minutes on two CPU cores.

Hidden size 512 at group size 32 gives the adapter 16 groups a row: fewer would slander a method whose freedom is the
number of groups. The weights are saved in bfloat16, as the models that people quantise are.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qalora_plugin.kernels.hardware import gemm_dtype

LENGTH = 256
BATCH = 4
WARMUP = 50
LEARNING_RATE = 2e-3
VOCABULARY = 4096
BOS, TURN, TURN_END = "<s>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, TURN, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=TURN_END, pad_token=TURN_END, chat_template=CHAT_TEMPLATE
    )


def rows(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts as rows of ``LENGTH`` ids, each text begun with BOS."""
    ids = [token for text in texts for token in tokenizer(text).input_ids]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    batch = batch.to(model.device)
    fast = gemm_dtype(torch.bfloat16, model.device) == torch.bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast):
        return model(input_ids=batch, labels=batch).loss


def train(model: LlamaForCausalLM, data: torch.Tensor, steps: int) -> None:
    """AdamW, warm-up and cosine; rows in a random order, begun again when they are used up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARMUP, 0.52 + 0.48 * math.cos(math.pi * i / steps))
    )
    order = torch.cat([torch.randperm(len(data)) for _ in range(math.ceil(steps * BATCH / len(data)))])
    for step in track(range(steps), "pretraining"):
        batch_loss = loss(model, data[order[step * BATCH : (step + 1) * BATCH]])
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}, loss {batch_loss.item():.3f}", flush=True)


def main(text: Path, out: Path, steps: int) -> None:
    torch.manual_seed(0)
    texts = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{model.num_parameters() / 1e6:.1f} M parameters on {model.device}")
    train(model, rows(texts, tokenizer), steps)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{steps * BATCH * LENGTH / 1e6:.2f} M tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path, help="JSON lines")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--steps", type=int, default=900)
    arguments = parser.parse_args()
    main(arguments.text, arguments.out, arguments.steps)
