"""The merge over shapes × groups × bits × zero storage × act-order × rank: the stored tensors are the definition."""

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.fabricate import quantize
from support.layers import read_stored

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core import reference
from qalora_plugin.formats.opened import QuantizedCheckpoint

cases = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([32, 64, 128, -1]),
        "sym": st.booleans(),
        "checkpoint_format": st.sampled_from(["gptq", "gptq_v2"]),
        "act_order": st.booleans(),
        "store_g_idx": st.booleans(),
        "in_features": st.sampled_from([128, 256, 384]),
        "out_features": st.sampled_from([32, 96]),
        "rank": st.integers(1, 9),
        "alpha": st.sampled_from([1, 16, 24]),
        "rslora": st.booleans(),
        "offset_dtype": st.sampled_from(["float16", "float32"]),
        "seed": st.integers(0, 2**31),
    }
)


def write_base(folder: Path, case: dict) -> dict:
    """A checkpoint of one quantised linear, ``layer.up_proj``; returns its tensors."""
    generator = torch.Generator().manual_seed(case["seed"])
    weight = torch.randn(case["out_features"], case["in_features"], generator=generator)
    keys = ("bits", "group_size", "sym", "checkpoint_format", "act_order")
    tensors = quantize(weight, **{key: case[key] for key in keys}, generator=generator)
    stored = dict(tensors)
    if not case["store_g_idx"] and not case["act_order"]:
        del stored["g_idx"]
    folder.mkdir()
    save_file(
        {f"layer.up_proj.{name}": value.contiguous() for name, value in stored.items()}, folder / "model.safetensors"
    )
    quantization = {key: case[key] for key in keys[:4]} | {"quant_method": "gptq", "desc_act": case["act_order"]}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return tensors


def write_adapter(folder: Path, base: Path, case: dict) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A random adapter of that linear; returns A [R, G], B [N, R] and its scaling."""
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    groups = 1 if case["group_size"] == -1 else case["in_features"] // case["group_size"]
    lora_a = torch.randn(case["rank"], groups, generator=generator)
    lora_b = torch.randn(case["out_features"], case["rank"], generator=generator)
    folder.mkdir()
    save_file(
        {
            "base_model.model.layer.up_proj.lora_A.weight": lora_a,
            "base_model.model.layer.up_proj.lora_B.weight": lora_b,
        },
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "QALORA",
        "r": case["rank"],
        "lora_alpha": case["alpha"],
        "use_rslora": case["rslora"],
        "qalora": {
            "pooling": "sum",
            "format_version": 1,
            "base_fingerprint": QuantizedCheckpoint.open(base).fingerprint(),
        },
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return lora_a, lora_b, case["alpha"] / (case["rank"] ** 0.5 if case["rslora"] else case["rank"])


@given(cases)
@settings(max_examples=80, deadline=None)
def test_merge_is_one_addition(case):
    with tempfile.TemporaryDirectory() as parent:
        base, adapter, out = (Path(parent) / name for name in ("base", "adapter", "out"))
        tensors = write_base(base, case)
        lora_a, lora_b, scaling = write_adapter(adapter, base, case)
        assert AdapterFolder.open(adapter).scaling("layer.up_proj") == scaling
        merge(base, adapter, out, case["offset_dtype"], progress=False, offsets="dense")

        source = QuantizedCheckpoint.open(out)
        merged, (module,) = source.files, source.specs.values()
        assert (module.bits, module.in_features, module.out_features) == (
            case["bits"], case["in_features"], case["out_features"],
        )  # fmt: skip
        for name in ("qweight", "qzeros", "scales"):
            assert torch.equal(merged.tensor(f"layer.up_proj.{name}"), tensors[name])
        offsets = merged.tensor("layer.up_proj.offsets")
        expected = reference.adapter_offsets(lora_a, lora_b, scaling)
        assert torch.equal(offsets, expected.to(getattr(torch, case["offset_dtype"])))

        x = torch.randn(3, case["in_features"], dtype=torch.float64)
        parts = {name: tensors[name] for name in ("qweight", "qzeros", "scales", "g_idx")}
        stored = read_stored(parts, case["bits"], case["checkpoint_format"])
        weight = reference.dequantize(stored)
        served = x @ reference.dequantize(stored._replace(offsets=offsets))
        trained = reference.adapter_linear(x, weight, tensors["g_idx"], lora_a.double(), lora_b.double(), scaling)
        tolerance = {"float16": 2e-3, "float32": 1e-6}[case["offset_dtype"]]
        assert (served - trained).abs().max() <= tolerance * trained.abs().max()
