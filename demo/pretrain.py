"""Stage 2: a small Llama from scratch, so that the demo needs no download. Some minutes on two CPU cores.

Hidden size 512 at group size 32 gives the adapter 16 groups a row: fewer would slander a method whose freedom is the
number of groups. The weights are saved in bfloat16, as the models that people quantise are.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qalora_plugin.kernels.dequant import gemm_dtype

LENGTH = 256
BATCH = 4
WARMUP = 50
LEARNING_RATE = 2e-3


def tokens(corpus: Path, name: str, tokenizer) -> torch.Tensor:
    """All texts of a file as rows of ``LENGTH`` ids, each text begun with BOS."""
    lines = (corpus / name).read_text(encoding="utf-8").splitlines()
    ids = [token for line in lines for token in tokenizer(json.loads(line)["text"]).input_ids]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    rows = rows.to(model.device)
    fast = gemm_dtype(torch.bfloat16, model.device) == torch.bfloat16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=fast):
        return model(input_ids=rows, labels=rows).loss


def train(model: LlamaForCausalLM, rows: torch.Tensor, steps: int) -> None:
    """AdamW, warm-up and cosine; rows in a random order, begun again when they are used up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARMUP, 0.52 + 0.48 * math.cos(math.pi * i / steps))
    )
    order = torch.cat([torch.randperm(len(rows)) for _ in range(math.ceil(steps * BATCH / len(rows)))])
    for step in track(range(steps), "pretraining"):
        batch_loss = loss(model, rows[order[step * BATCH : (step + 1) * BATCH]])
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}, loss {batch_loss.item():.3f}", flush=True)


def main(corpus: Path, out: Path, steps: int) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
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
    train(model, tokens(corpus, "pretrain.jsonl", tokenizer), steps)
    with torch.inference_mode():
        held_out = tokens(corpus, "heldout.jsonl", tokenizer)[:256].split(BATCH)
        held_out_loss = sum(loss(model, rows).item() for rows in held_out) / len(held_out)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{steps * BATCH * LENGTH / 1e6:.2f} M tokens, loss on held-out modules {held_out_loss:.3f} a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--steps", type=int, default=900)
    arguments = parser.parse_args()
    main(arguments.corpus, arguments.out, arguments.steps)
