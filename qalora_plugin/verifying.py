"""The proof: a merged checkpoint equals base + adapter. Everything is read back from disk, nothing taken on trust."""

import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from .adapter_folder import AdapterFolder
from .errors import QALoraError
from .quant.checkpoint import Checkpoint
from .quant.modules import (
    MERGED_METHOD,
    QuantizedModule,
    checkpoint_format,
    column_groups,
    quantized_modules,
    require_base,
)
from .quant.reference import adapter_offsets, dequantize
from .tokens import default_texts, tokenise

# By how the offsets are stored: relative logit difference (maximum norm) and least top-1 agreement, float32 compute …
BARS = {"float32": (1e-5, 1.0), "float16": (1e-3, 0.995)}
# … and the weights' error relative to what the adapter adds. Rounding to float16 costs 2e-4, but more below 6e-5,
# where float16 loses digits: a very small adapter would vanish without any logit showing it.
WEIGHT_BARS = {"float32": 1e-6, "float16": 1e-3}
_COLUMNS = 512  # output columns of a weight that are compared at a time


@dataclass(frozen=True)
class VerifyReport:
    """What was compared and what was found. Differences are merged − (base + adapter)."""

    base: str
    adapter: str
    merged: str
    tensors: int
    tensors_identical: int
    base_sha256: str
    modules: int
    weight_error_max: float
    """Largest |w' − definition| over all adapted weights, float64, in weight units."""
    weight_error_relative: float
    """‖w' − definition‖ / ‖what the adapter adds‖ over all adapted weights, float64."""
    tokens: int
    dtype: str
    logit_difference: float
    """max|Δ logits| / max|logits|, both over all tokens: the relative error in the maximum norm."""
    kl_mean: float
    """Mean KL(base + adapter ‖ merged) a token, nats."""
    top1_agreement: float
    offset_dtype: str
    base_bytes: int
    merged_new_bytes: int

    @property
    def passed(self) -> bool:
        """Base tensors identical, the bar on the weights; in float32 also the bars on the logits."""
        difference, agreement = BARS[self.offset_dtype]
        exact = self.tensors_identical == self.tensors
        exact = exact and self.weight_error_relative <= WEIGHT_BARS[self.offset_dtype]
        if self.dtype != "float32":
            return exact
        return exact and self.logit_difference <= difference and self.top1_agreement >= agreement

    def json(self) -> str:
        return json.dumps(asdict(self) | {"passed": self.passed}, indent=2)

    def print(self) -> None:
        difference, agreement = BARS[self.offset_dtype]
        bar = f"≤ {difference:g}, ≥ {agreement:.1%}" if self.dtype == "float32" else "(bars hold in float32)"
        table = Table(title=f"qalora verify: {'PASSED' if self.passed else 'FAILED'}", show_header=False)
        for row in (
            ("merged", self.merged),
            ("base tensors byte-identical", f"{self.tensors_identical} of {self.tensors}"),
            ("sha256 of the base's tensors", self.base_sha256),
            ("adapted linears", str(self.modules)),
            ("weight error", f"{self.weight_error_relative:.2g} of the adapter (max {self.weight_error_max:.2g})"
                             f"   bar: ≤ {WEIGHT_BARS[self.offset_dtype]:g}"),
            (f"logits, {self.dtype}, {self.tokens} tokens", f"max relative difference {self.logit_difference:.3g}"),
            ("top-1 agreement", f"{self.top1_agreement:.2%}   bars: {bar}"),
            ("mean KL", f"{self.kl_mean:.3g} nats"),
            ("size", f"{self.base_bytes / 1e6:.1f} MB base + {self.merged_new_bytes / 1e6:.1f} MB offsets"
                     f" ({self.offset_dtype}), {self.merged_new_bytes / self.base_bytes:.1%}"),
        ):  # fmt: skip
            table.add_row(*row)
        Console().print(table)


def verify(
    base: str | Path,
    adapter: str | Path,
    merged: str | Path,
    sequences: list[list[int]] | None = None,
    texts: list[str] | None = None,
    max_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> VerifyReport:
    """Compare a merged checkpoint with base + adapter: tensors, weights, logits.

    Args:
        sequences: token ids to compare logits on; else ``texts`` (else the standard library's documentation) is
            tokenised, up to ``max_tokens``.
        dtype: compute dtype of the logits; the bars are for float32.
        device: default CUDA if there is one.

    Raises:
        QALoraError: one of the three cannot be read, or they do not belong together.
    """
    source, result = Checkpoint.open(base, revision), Checkpoint.open(merged)
    opened, modules = AdapterFolder.open(adapter), require_base(source)
    if result.method != MERGED_METHOD:
        raise QALoraError(f"{merged} has quant_method {result.method!r}: it is no merged QA-LoRA checkpoint.")
    opened.check_fits(modules)
    identical, sha256 = _compare_tensors(source, result, progress)
    error_max, error_relative = _compare_weights(source, result, opened, modules, progress)
    if sequences is None:
        from transformers import AutoTokenizer

        sequences = tokenise(AutoTokenizer.from_pretrained(result.folder), texts or default_texts(), max_tokens)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _full_precision():
        logits = _compare_logits(source.folder, opened, result.folder, sequences, dtype, device)
    offsets = [name for name in result.tensors if name.endswith(".offsets")]
    return VerifyReport(
        base=str(base),
        adapter=str(adapter),
        merged=str(merged),
        tensors=len(source.tensors),
        tensors_identical=identical,
        base_sha256=sha256,
        modules=len(opened.modules),
        weight_error_max=error_max,
        weight_error_relative=error_relative,
        dtype=str(dtype).removeprefix("torch."),
        offset_dtype=result.quantization["offset_dtype"],
        base_bytes=source.nbytes,
        merged_new_bytes=sum(result.tensor(name).nbytes for name in offsets),
        **logits,
    )


def _compare_tensors(source: Checkpoint, result: Checkpoint, progress: bool) -> tuple[int, str]:
    """How many of the base's tensors are in the merged checkpoint bit for bit, and a hash over all of them."""
    digest, identical = hashlib.sha256(), 0
    for name in track(sorted(source.tensors), "tensors", disable=not progress, transient=True):
        info, other = source.tensors[name], result.tensors.get(name)
        data = _bytes_of(source.tensor(name))
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        digest.update(data.numpy())
        if other is not None and (other.dtype, other.shape) == (info.dtype, info.shape):
            identical += torch.equal(data, _bytes_of(result.tensor(name)))
    return identical, digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _compare_weights(
    source: Checkpoint, result: Checkpoint, adapter: AdapterFolder, modules: dict[str, QuantizedModule], progress: bool
) -> tuple[float, float]:
    """Largest and relative error of the merged weights against ``w + α/R·(B·A)ᵀ`` per group, in float64."""
    merged_modules = quantized_modules(result)
    worst, error, contribution = 0.0, 0.0, 0.0
    for name in track(adapter.modules, "weights", disable=not progress, transient=True):
        if merged_modules[name].offset_dtype is None:
            raise QALoraError(f"{result.folder}: {name} has no offsets, but the adapter changes it. Merge again.")
        group = torch.from_numpy(column_groups(source, modules[name])).long()
        delta = adapter_offsets(*map(torch.from_numpy, adapter.factors(name)), adapter.scaling(name))
        before, after = _dense_columns(source, modules[name]), _dense_columns(result, merged_modules[name])
        for start in range(0, modules[name].out_features, _COLUMNS):
            columns = slice(start, start + _COLUMNS)
            added = delta[group, columns]
            difference = after(columns) - (before(columns) + added)
            worst = max(worst, difference.abs().max().item())
            error += difference.square().sum().item()
            contribution += added.square().sum().item()
    return worst, (error / contribution) ** 0.5 if contribution else 0.0


def _dense_columns(checkpoint: Checkpoint, module: QuantizedModule) -> Callable[[slice], Tensor]:
    """Columns of the dense weight [K, …] in float64, by the reference, offsets included if there are any."""
    names = ("qweight", "qzeros", "scales", "offsets") if module.offset_dtype else ("qweight", "qzeros", "scales")
    parts = {name: checkpoint.tensor(f"{module.name}.{name}") for name in names}
    group = torch.from_numpy(column_groups(checkpoint, module))
    fmt = checkpoint_format(checkpoint.quantization)

    def columns(n: slice) -> Tensor:
        words = slice(n.start * module.bits // 32, n.stop * module.bits // 32)
        part = {name: tensor[:, words if name == "qzeros" else n] for name, tensor in parts.items()}
        return dequantize(**part, g_idx=group, bits=module.bits, checkpoint_format=fmt)

    return columns


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, though a training run set TF32: its 10 bits would hide what is compared."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _compare_logits(
    base: Path, adapter: AdapterFolder, merged: Path, sequences: list[list[int]], dtype: torch.dtype, device: str
) -> dict[str, Any]:
    from .adapter import load_adapter
    from .quant.loading import load_base, load_model

    options = {"model_class": adapter.model_class, "dtype": dtype}
    expected = list(_logits(load_adapter(load_base(base, **options), adapter.folder), sequences, device))
    gc.collect()
    found = _logits(load_model(merged, **options), sequences, device)
    tokens, agree, kl, largest_difference, largest_logit = 0, 0, 0.0, 0.0, 0.0
    for p, q in zip(expected, found, strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        tokens += len(p)
        largest_difference = max(largest_difference, (p - q).abs().max().item())
        largest_logit = max(largest_logit, p.abs().max().item())
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
    return {
        "tokens": tokens,
        "logit_difference": largest_difference / largest_logit,
        "kl_mean": kl / tokens,
        "top1_agreement": agree / tokens,
    }


@torch.inference_mode()
def _logits(model: Any, sequences: list[list[int]], device: str) -> Iterator[Tensor]:
    """Float32 logits ``[T, vocabulary]`` of every sequence, on the CPU."""
    model = model.to(device).eval()
    for ids in sequences:
        yield model(torch.tensor([ids], device=device)).logits[0].float().cpu()
