"""Bases of ``fabricate``'s model in other formats than GPTQ, by those formats' own libraries where they have any."""

import importlib.util
import json
import tarfile
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from support.fabricate import make_base

ROOT = Path(__file__).parents[2]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def autoawq_packing():
    """AutoAWQ's ``packing_utils``, by path from its sdist: the package itself no longer installs beside this torch."""
    archives = sorted((ROOT / ".cache").glob("autoawq-*.tar.gz"))
    assert archives, "no AutoAWQ sdist in .cache: run `make .cache/autoawq`"
    target = ROOT / ".cache" / "autoawq_src"
    name = f"{archives[0].name.removesuffix('.tar.gz')}/awq/utils/packing_utils.py"
    with tarfile.open(archives[0]) as archive:
        archive.extract(name, target, filter="data")
    spec = importlib.util.spec_from_file_location("autoawq_packing_utils", target / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def awq_words(codes):
    """Codes ``[R, N]`` → int32 ``[R, N/8]``, as ``WQLinear_GEMM.from_linear`` packs them."""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for i, column in enumerate(AWQ_ORDER):
        words |= codes[:, column::8].long() << 4 * i
    return (((words & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def awq_linear(in_features, out_features, group_size, generator, zeros=None):
    groups = in_features // group_size
    codes = torch.randint(0, 16, (in_features, out_features), generator=generator)
    if zeros is None:
        zeros = torch.randint(0, 16, (groups, out_features), generator=generator)
    scales = (torch.rand(groups, out_features, generator=generator) * 0.05 + 0.01).half()
    return {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}


def packed_linear(in_features, out_features, bits, group_size, symmetric, generator, dtype=torch.float16, g_idx=None):
    """A random linear as compressed-tensors stores it, and its scheme."""
    strategy = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    if g_idx is not None:
        strategy["actorder"] = "group"
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups, half = in_features // (group_size or in_features), 2 ** (bits - 1)
    scales = (torch.rand(out_features, groups, generator=generator) * 0.05 + 0.01).to(dtype)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype) * half * 0.02
    state = {"weight": weight, "weight_scale": scales}
    if g_idx is not None:
        state["weight_g_idx"] = g_idx.int()
    if not symmetric:
        zeros = torch.randint(-half, half, (out_features, groups), generator=generator)
        state["weight_zero_point"] = zeros.to(torch.int8)
    return PackedQuantizationCompressor.compress(state, scheme), scheme


def decompressed(parts, scheme):
    """What the library makes of it, ``[N, K]``."""
    return PackedQuantizationCompressor.decompress(dict(parts), scheme)["weight"]


def shapes_of(base):
    """Quantized linears of a GPTQ base → (K, N)."""
    tensors = load_file(base / "model.safetensors")
    return {
        name.removesuffix(".qweight"): (tensor.shape[0] * 8, tensor.shape[1])
        for name, tensor in tensors.items()
        if name.endswith(".qweight")
    }


def rewritten(folder, quantization, linear, **base_options):
    """A base whose linears are ``linear(name, K, N)`` → tensors by part, with this ``quantization_config``."""
    base = make_base(folder, **base_options)
    shapes = shapes_of(base)
    tensors = {
        name: tensor
        for name, tensor in load_file(base / "model.safetensors").items()
        if not name.endswith((".qweight", ".qzeros", ".scales", ".g_idx"))
    }
    for name, shape in shapes.items():
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in linear(name, *shape).items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return base


def make_awq(folder, group_size=32, seed=0, quantization=None, **base_options):
    generator = torch.Generator().manual_seed(seed)
    stated = {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["lm_head"], **(quantization or {}),
    }  # fmt: skip
    return rewritten(folder, stated, lambda name, k, n: awq_linear(k, n, group_size, generator), **base_options)


def make_packed(
    folder, bits=4, group_size=32, symmetric=True, dtype=torch.float16, act_order=False, other=None, seed=0
):
    """A pack-quantized checkpoint and its schemes by name.

    Args:
        other: ``(substring, bits, group_size, symmetric)`` of linears with settings, and a config group, of their own.
    """
    generator, found, schemes = torch.Generator().manual_seed(seed), {}, {}

    def linear(name, k, n):
        settings = (bits, group_size, symmetric) if other is None or other[0] not in name else other[1:]
        g_idx = torch.randperm(k, generator=generator) // settings[1] if act_order else None
        parts, scheme = packed_linear(k, n, *settings, generator, dtype, g_idx)
        found[name] = scheme
        schemes.setdefault(settings, scheme.model_dump(mode="json"))
        return parts

    base = rewritten(folder, {}, linear)
    stated = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {f"group_{i}": scheme for i, scheme in enumerate(schemes.values())}, "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }  # fmt: skip
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    return base, found
