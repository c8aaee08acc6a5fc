"""Merged checkpoints without an adapter: a fabricated base plus random offsets, written as a merge writes them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_base, quantize

from qalora_plugin.conversion.writer import ShardWriter, write_config, write_index
from qalora_plugin.formats.opened import QuantizedCheckpoint

HIDDEN = 256  # four heads of 64: vLLM's CPU attention wants 32 or more
ALL = ("proj", "lm_head")


def make_merged(
    folder: Path,
    targets: tuple[str, ...] = ALL,
    offset_dtype: torch.dtype = torch.float16,
    quantized_head: bool = False,
    scales: tuple[str, ...] = (),
    factored: tuple[str, ...] = (),
    **base_kwargs,
) -> Path:
    """Write ``folder/base`` and ``folder/merged``; returns the latter.

    Args:
        targets: substrings of the names of the linears that get offsets.
        quantized_head: the base's ``lm_head`` is quantised too.
        scales: substrings of the names of the linears whose scales are changed.
        factored: of those whose offsets are factored, of rank 3 (2 in q and v).
        base_kwargs: for :func:`support.fabricate.make_base`.
    """
    base = make_base(folder / "base", hidden=HIDDEN, **base_kwargs)
    calm(base)
    if quantized_head:
        quantize_head(base, **base_kwargs)
    return add_offsets(base, folder / "merged", targets, offset_dtype, scales, factored)


def add_offsets(
    base: Path,
    merged: Path,
    targets: tuple[str, ...] = ALL,
    offset_dtype: torch.dtype = torch.float16,
    scales: tuple[str, ...] = (),
    factored: tuple[str, ...] = (),
) -> Path:
    """Write ``merged``, ``base`` with random offsets for the linears whose names hold one of ``targets``."""
    source = QuantizedCheckpoint.open(base)
    files = source.files
    merged.mkdir()
    weights = "model-00001-of-00001.safetensors"
    (merged / weights).hardlink_to(base / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    writer = ShardWriter(merged, "offsets")
    for name, spec in source.specs.items():
        if any(target in name for target in targets):
            step = files.tensor(f"{name}.scales").float()
            shift = 2 ** (spec.bits - 5) * torch.randn(spec.groups, spec.out_features, generator=generator)
            if any(part in name for part in factored):
                rank = 2 if name.endswith(("q_proj", "v_proj")) else 3
                other = torch.randn(rank, spec.out_features, generator=generator)
                writer.add(f"{name}.offsets_a", shift[:, :rank].contiguous() * step.mean() / rank**0.5)
                writer.add(f"{name}.offsets_b", other.to(offset_dtype))
            else:
                writer.add(f"{name}.offsets", (step * shift).to(offset_dtype))
        if any(target in name for target in scales):
            step = files.tensor(f"{name}.scales").float()
            change = 0.3 * torch.randn(step.shape, generator=torch.Generator().manual_seed(2))
            writer.add(f"{name}.scales_delta", (step * change).to(offset_dtype))
    weight_map = dict.fromkeys(files.tensors, weights) | writer.finish()
    write_index(merged, weight_map, 0)
    quantization = files.quantization | {
        "quant_method": "qalora",
        "desc_act": source.act_order,
        "sym": source.symmetric,
        "offset_dtype": str(offset_dtype).removeprefix("torch."),
        "base_model": str(base),
        "base_fingerprint": source.fingerprint(),
        "adapter": "none",
    }
    write_config(merged, files.config, quantization, weight_map)
    for path in base.glob("tokenizer*"):
        (merged / path.name).hardlink_to(path)
    return merged


def calm(base: Path) -> None:
    """Shrink the weights to a trained model's size: bfloat16 itself would be off by more than the tests tolerate."""
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if name.endswith(".scales") or name == "lm_head.weight":
            tensors[name] = tensors[name] * (0.1 if name == "lm_head.weight" else 0.25)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def quantize_head(base: Path, bits: int = 4, group_size: int = 32, sym: bool = False, checkpoint_format: str = "gptq"):
    tensors = load_file(base / "model.safetensors")
    parts = quantize(tensors.pop("lm_head.weight"), bits, group_size, sym, checkpoint_format)
    tensors |= {f"lm_head.{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit_quantization(base, lm_head=True)


def edit_quantization(folder: Path, **changes) -> None:
    """Change keys of ``quantization_config`` in ``config.json``."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    write_json(folder / "config.json", config)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))
