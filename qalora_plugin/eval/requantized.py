"""What re-quantizing a merged checkpoint does to its logits: the merged one against its 8-bit export."""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from qalora_plugin.checkpoint.hub import expanded
from qalora_plugin.conversion.export_gptq8 import add_logit_change
from qalora_plugin.eval.limits import fitting_length, model_config, vocabulary
from qalora_plugin.eval.logits import full_precision
from qalora_plugin.eval.tokens import SEQUENCE_LENGTH, default_texts, load_tokenizer, require_ids, tokenize


@dataclass(frozen=True)
class LogitChange:
    """Differences export − merged, in float32, over ``tokens`` tokens.

    Attributes:
        largest: max|Δ logits| / max|logits|. kl_mean: mean KL(merged ‖ export) a token, nats.
        top1_agreement: share of the tokens whose likeliest successor is the same.
    """

    tokens: int
    largest: float
    kl_mean: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"over {self.tokens} tokens they move by ≤ {self.largest:.2g} of the largest, KL {self.kl_mean:.2g} nats, "
            f"top-1 agreement {self.top1_agreement:.2%}"
        )


def measure_requantized(
    merged: str | Path, export: str | Path, tokens: int = 512, sequences: list[list[int]] | None = None
) -> LogitChange:
    """Run both models, one after the other, and write the figures into the card of the export.

    Args:
        tokens: of Python's own documentation, unless ``sequences`` of token ids are given.
    """
    merged, export = expanded(merged), expanded(export)
    config = model_config(merged)
    if sequences is None:
        length = fitting_length(config, SEQUENCE_LENGTH)
        sequences = tokenize(load_tokenizer(merged), default_texts(), tokens, length)
    require_ids(sequences, vocabulary(config), merged)
    expected, found = _logits(merged, sequences), _logits(export, sequences)
    log_p, log_q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    change = LogitChange(
        tokens=len(expected),
        largest=((found - expected).abs().max() / expected.abs().max()).item(),
        kl_mean=(log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        top1_agreement=(expected.argmax(-1) == found.argmax(-1)).double().mean().item(),
    )
    add_logit_change(Path(export), str(change))
    return change


@torch.inference_mode()
def _logits(folder: str | Path, sequences: list[list[int]]) -> torch.Tensor:
    """float32 ``[T, vocabulary]`` of all sequences."""
    from qalora_plugin.integrations.transformers.loading import load_base

    model = load_base(folder, dtype=torch.float32).eval()
    with full_precision():
        logits = torch.cat([model(torch.tensor([ids])).logits[0] for ids in sequences])
    del model
    gc.collect()
    return logits
