"""Logits of base + adapter and of the merged checkpoint, on the same tokens."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.reference import adapter_offsets, adapter_scales, factored_offsets
from qalora_plugin.eval.routing import recorded, replayed


def compare_logits(
    base: Path, adapter: AdapterFolder, merged: Path, sequences: list[list[int]], dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """How far the merged checkpoint's logits are from those of base + adapter; keys as in ``VerifyReport``.

    The merged model runs twice: with its offsets and changes of scales as stored, then with those of the other dtype.
    So one of the two has them exact, and one rounded to float16. Its experts follow the routing of base + adapter
    (:mod:`.routing`).
    """
    from qalora_plugin.integrations.peft.loading import load_adapter
    from qalora_plugin.integrations.transformers.launched import alone
    from qalora_plugin.integrations.transformers.loading import load_base, load_model

    with full_precision(), alone():
        options: dict[str, Any] = {"model_class": adapter.model_class, "dtype": dtype}
        model: Any = load_adapter(load_base(base, **options), adapter.folder)
        with recorded(model) as routing:
            expected = list(_logits(model, sequences, device))
        exact = exact_values(model)
        del model
        gc.collect()
        model = load_model(merged, **options)
        largest = max(logits.abs().max().item() for logits in expected)
        tokens, agree, kl, stored, again = 0, 0.0, 0.0, 0.0, 0.0
        with replayed(model, routing) as flips:
            for p, q in zip(expected, _logits(model, sequences, device), strict=True):
                log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
                tokens += len(p)
                stored = _larger(stored, p - q)
                kl += (log_p.exp() * (log_p - log_q)).sum().item()
                agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        stored_exactly = False
        for name, (offsets, scales_delta) in exact.items():
            layer = model.get_submodule(name)
            stored_exactly = (layer.offsets if layer.offsets_b is None else layer.offsets_b).dtype == torch.float32
            layer.offsets_a = layer.offsets_b = None
            other = torch.float16 if stored_exactly else torch.float32
            layer.offsets = offsets.to(model.device, other)
            if scales_delta is not None:
                layer.scales_delta = scales_delta.to(model.device, other)
        with replayed(model, routing) as flips_again:
            for p, q in zip(expected, _logits(model, sequences, device), strict=True):
                again = _larger(again, p - q)
    (error, flipped), (sensitivity, by_rounding) = (
        ((stored, flips), (again, flips_again)) if stored_exactly else ((again, flips_again), (stored, flips))
    )
    return {
        "tokens": tokens,
        "logit_difference": stored / largest,
        "logit_error": error / largest,
        "logit_sensitivity": sensitivity / largest,
        "kl_mean": kl / tokens,
        "top1_agreement": agree / tokens,
        "router_choices": routing.choices,
        "router_flips": flipped.count,
        "router_flips_by_rounding": by_rounding.count,
    }


def exact_values(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Offsets and changes of scales (None for none) [G, N] of every adapted linear of a PEFT model ([E, G, N] of
    experts), in float32: what its merge stores rounded."""
    from qalora_plugin.integrations.peft.adapter import QALoraLayer
    from qalora_plugin.layers.experts import unstacked

    values: dict[str, tuple[Tensor, Tensor | None]] = {}
    layer: Any
    for name, layer in model.named_modules():
        if isinstance(layer, QALoraLayer):
            (active,) = layer.active_adapters
            base: Any = layer.get_base_layer()
            _, _, _, offsets, _, _, scales_delta, offsets_a, offsets_b, _ = base.tensors()
            lora_a, lora_b = (part[active].weight.detach().cpu() for part in (layer.lora_A, layer.lora_B))
            change, unit, ratios = None, None, layer.ratios[active]
            if active in layer.lora_D:
                unit = base.quantized.scales.cpu()
            delta = OffsetDelta(lora_a, lora_b, layer.scaling[active] * ratios.offsets**2)
            if lora_b.ndim == 3:
                units = [None] * len(lora_b) if unit is None else unit
                exact = torch.stack(
                    [adapter_offsets(*one, of) for one, of in zip(unstacked(delta), units, strict=True)]
                )
            else:
                exact = adapter_offsets(*delta, unit)
            if offsets is not None:
                exact += offsets.cpu()
            if offsets_a is not None:
                exact += factored_offsets(offsets_a.cpu(), offsets_b.cpu())
            if unit is not None:
                d, c = (part[active].weight.detach().cpu().double() for part in (layer.lora_D, layer.lora_C))
                change = adapter_scales(unit, d * ratios.scales**2, c)
                if scales_delta is not None:
                    change += scales_delta.cpu()
                change = change.float()
            values[name.removeprefix("base_model.model.")] = exact.float(), change
    return values


def _larger(value: float, difference: Tensor) -> float:
    """The larger of ``value`` and all of ``|difference|``; NaN if anything is."""
    return torch.maximum(torch.tensor(value), difference.abs().max()).item()


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32, though a training run set TF32: its 10 bits would hide what is compared."""
    settings: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # untyped
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@torch.inference_mode()
def _logits(model: Any, sequences: list[list[int]], device: str) -> Iterator[Tensor]:
    """Float32 logits ``[T, vocabulary]`` of every sequence, on the CPU."""
    model = model.to(device).eval()
    for ids in sequences:
        yield model(torch.tensor([ids], device=device)).logits[0].float().cpu()
