"""The whole line for one base: load, train a step, save, load the adapter, merge, verify, against a dense twin."""

from dataclasses import dataclass
from pathlib import Path

import torch
from families.bases import Base, fold_into_dense

from qalora_plugin import add_adapter, load_base, merge, verify
from qalora_plugin.integrations.peft.adapter import QALoraLayer
from qalora_plugin.integrations.transformers.loading import load_model
from qalora_plugin.layers.linear import QuantLinear

RANK, ALPHA = 4, 8
TOLERANCE = 2e-5  # max|Δ logits| / max|logits| in float32


@dataclass
class Outcome:
    """Figures of one run: linears quantised and adapted, and relative logit differences."""

    quantized: int
    adapted: int
    base: float
    """Base against its dense twin."""
    trained: float
    """Model after a training step against the twin with the saved adapter added to its dense weights."""
    merged: float
    """Merged checkpoint against base + adapter loaded again, as ``verify`` reports it."""
    missing: list[str]
    """Quantised linears without an adapter."""


def run_line(base: Base, work: Path) -> Outcome:
    """
    Raises:
        QALoraError: the base is refused.
        AssertionError: a comparison misses :data:`TOLERANCE`, or would see nothing.
    """
    tokens = torch.randint(4, 99, (2, 32), generator=torch.Generator().manual_seed(1))
    twin = load_model(base.dense, dtype=torch.float32).eval()
    model = load_base(base.folder, dtype=torch.float32).eval()
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    wanted = {*base.linears, *base.experts}
    assert set(packed) == wanted, set(packed) ^ wanted
    difference = relative(logits(model, tokens), logits(twin, tokens))

    peft_model = add_adapter(model, r=RANK, lora_alpha=ALPHA, target_modules="all-linear").train()
    adapted = [
        name.removeprefix("base_model.model.")
        for name, module in peft_model.named_modules()
        if isinstance(module, QALoraLayer)
    ]
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    loss = peft_model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert loss.isfinite(), "the loss is not finite"
    loss.backward()
    optimizer.step()
    peft_model.eval()
    peft_model.save_pretrained(work / "adapter")
    folded = load_model(
        fold_into_dense(base, work / "adapter", work / "folded", ALPHA / RANK), dtype=torch.float32
    ).eval()
    trained = relative(logits(peft_model, tokens), logits(folded, tokens))
    moved = relative(logits(folded, tokens), logits(twin, tokens))
    assert moved > 100 * TOLERANCE, f"the step moved the logits by {moved} only: the comparisons would see nothing"

    merge(base.folder, work / "adapter", work / "merged", offset_dtype="float32", progress=False)
    report = verify(
        base.folder, work / "adapter", work / "merged", sequences=tokens.tolist(), device="cpu", progress=False
    )
    assert report.passed, report.json()
    assert max(difference, trained) <= TOLERANCE, (difference, trained)
    return Outcome(
        quantized=sum(len(base.experts.get(name, "1")) for name in packed),
        adapted=sum(len(base.experts.get(name, "1")) for name in adapted),
        base=difference,
        trained=trained,
        merged=report.logit_difference,
        missing=sorted(set(packed) - set(adapted)),
    )


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, use_cache=False).logits.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.isfinite().all(), "the dense twin's logits are not finite"
    return ((found - expected).abs().max() / expected.abs().max()).item()
