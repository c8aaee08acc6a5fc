"""Log-probabilities by transformers, which vLLM's are held against."""

import inspect
import textwrap
from pathlib import Path

import torch
from support.fabricate import make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import qalora_plugin

MEAN_TOLERANCE = {
    torch.bfloat16: 5e-3,  # measured 3e-3; transformers' own bfloat16 is 3e-3 off its float32
    torch.float16: 1e-3,
    torch.float32: 1e-5,  # measured 1e-6
}


@torch.no_grad()
def score(folder: Path, tokens: Tensor, dtype: torch.dtype, with_offsets: bool = True) -> Tensor:
    """Log-probability of each token given those before it, ``[B, T] → [B, T − 1]``; for a base or a merged folder."""
    load = AutoModelForCausalLM.from_pretrained if "merged" in folder.name else qalora_plugin.load_base
    model = load(folder, dtype=dtype)
    if not with_offsets:
        for module in model.modules():
            if getattr(module, "offsets", None) is not None:
                module.offsets.zero_()
            if getattr(module, "offsets_b", None) is not None:
                module.offsets_b.zero_()
    logprobs = torch.log_softmax(model(tokens).logits.float(), dim=-1)
    return logprobs[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)


def text_tokens(rows: int, length: int) -> Tensor:
    """Text that comes with Python, one token a character (``fabricate.make_tokenizer``), ``[B, T]``."""
    text = inspect.getsource(textwrap)[: rows * length]
    return torch.tensor(make_tokenizer()(text)["input_ids"]).view(rows, length)
