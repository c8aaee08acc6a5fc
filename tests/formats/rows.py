"""The formats of docs/formats.md: how to make a source of a case, convert it, and read the result, each by code of the
format's own project where there is any."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from formats.cells import CASES, RANK, Case, Sample, Weights, factor_a, weights
from formats.gguf_types import TYPES, GgufSample
from peft import LoraConfig
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import load_file, save_file

from qalora_plugin.conversion.import_adapter import import_peft
from qalora_plugin.conversion.import_official import import_official
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.core import reference

Converted = tuple[Weights, Weights, Weights | None]  # found, wanted, wanted without the adapter
ONE = "model.layers.0.mlp.down_proj"  # PEFT pools as many columns of every linear: only those of one K pool all of it
K = 256


@dataclass(frozen=True)
class Row:
    """A format, in one direction.

    Attributes:
        exists: whether the format has such checkpoints at all.
        cases: what the table is over, by lines and columns.
    """

    direction: str
    name: str
    what: str
    convert: Callable[[Sample], Converted]
    exists: Callable[[Case], bool] = lambda case: True
    cases: Sequence = tuple(CASES)

    @property
    def title(self) -> str:
        return f"`qalora {self.direction} {self.name}`"


# Exports -------------------------------------------------------------------------------------------------------------


def lora(sample: Sample) -> Converted:
    """``w₀ + (B·A)ᵀ``, as every LoRA adds it."""
    out = export_lora(sample.adapter, sample.folder / "lora").folder
    tensors = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    found = {}
    for name, weight in sample.base_weights.items():
        lora_a, lora_b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        found[name] = weight + config["lora_alpha"] / config["r"] * (lora_b @ lora_a).t()
    return found, sample.merged_weights, sample.base_weights


# Imports -------------------------------------------------------------------------------------------------------------


def peft(sample: Sample) -> Converted:
    """What PEFT's own layer adds to rows of the identity is the weight that its adapter is."""
    pooled = sample.case.group_size if sample.case.group_size > 0 else K
    lora_a, lora_b = factor_a(K // pooled), sample.factor_b(ONE)
    settings = {"use_qalora": True, "qalora_group_size": pooled}
    adapter = sample.write_lora("peft", {ONE: (lora_a, lora_b)}, peft_type="LORA", **settings)
    base_layer = torch.nn.Linear(K, len(lora_b), bias=False)
    torch.nn.init.zeros_(base_layer.weight)
    config = LoraConfig(r=RANK, lora_alpha=RANK, **settings)
    layer = GPTQLoraLinear(base_layer, "default", config, r=RANK, lora_alpha=RANK)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = lora_a, lora_b
    with torch.no_grad():
        wanted = layer.double()(torch.eye(K, dtype=torch.float64))
    return _added(import_peft(adapter, sample.folder / "from-peft").folder, sample), {ONE: wanted}, None


def official_adapter(sample: Sample) -> Converted:
    """The official ``peft_utils.py`` pools with ``AvgPool1d``."""
    pooled = sample.case.group_size if sample.case.group_size > 0 else K
    lora_a, lora_b = factor_a(K // pooled), sample.factor_b(ONE)
    adapter = sample.write_lora("official", {ONE: (lora_a, lora_b)}, peft_type="LORA")
    means = torch.nn.AvgPool1d(pooled)(torch.eye(K, dtype=torch.float64))
    out = import_official(adapter, sample.folder / "from-official", progress=False).folder
    return _added(out, sample), {ONE: means @ lora_a.double().t() @ lora_b.double().t()}, None


def _added(adapter, sample: Sample) -> Weights:
    """What an adapter of ours adds, by the definition."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    lora_a, lora_b = (tensors[f"base_model.model.{ONE}.lora_{part}.weight"] for part in "AB")
    return {ONE: reference.adapter_offsets(lora_a, lora_b, 1)[reference.column_groups(sample.opened.weight(ONE))]}


def official_merge(sample: Sample) -> Converted:
    """``merge.py`` on float32 zeros, unpacked, of an adapter on every linear."""
    opened, wanted = sample.opened, {}
    tensors = {name: opened.files.tensor(name) for name in opened.files.tensors}
    for name, spec in opened.specs.items():
        weight = opened.weight(name)
        scales, added = tensors[f"{name}.scales"].float(), sample.factor_b(name) @ factor_a(spec.groups)
        tensors[f"{name}.qzeros"] = weight.zeros.float() - added.t() / scales
        float_zeros = weight._replace(zeros=tensors[f"{name}.qzeros"], scales=scales)
        wanted[name] = reference.dequantize(float_zeros)
    folder = shutil.copytree(sample.base, sample.folder / "official-merge")
    save_file(tensors, folder / "model.safetensors")
    out = import_official(folder, sample.folder / "from-official-merge", sample.base, progress=False).folder
    return weights(out), wanted, None


# Waiting for their conversions ---------------------------------------------------------------------------------------


def gguf_export(sample: Sample) -> Converted:
    """Read by gguf-py. Of q and k, whose rows llama.cpp orders otherwise, nothing is compared."""
    import gguf

    from qalora_plugin.conversion.export_gguf import export_gguf

    out = sample.folder / "model.gguf"
    export_gguf(sample.merged, out, progress=False)
    names = {f"blk.0.ffn_{part}.weight": f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
    found = {
        names[tensor.name]: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).t().double()
        for tensor in gguf.GGUFReader(out).tensors
        if tensor.name in names
    }
    assert found.keys() == set(names.values())
    return found, sample.merged_weights, sample.base_weights


def mlx_export(sample: Sample) -> Converted:
    """Dequantized by mlx."""
    import mlx.core as mx
    import numpy as np

    from qalora_plugin.conversion.export_mlx import export_mlx

    out = sample.folder / "mlx"
    export_mlx(sample.merged, out, progress=False)
    tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= mx.load(str(file))
    found = {}
    for name, spec in sample.opened.specs.items():  # a group larger than MLX has is several
        words, scales, biases = (tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
        dense = mx.dequantize(words, scales, biases, group_size=spec.in_features // scales.shape[1], bits=spec.bits)
        found[name] = torch.from_numpy(np.array(dense.astype(mx.float32))).t().double()
    return found, sample.merged_weights, sample.base_weights


def gptq8_export(sample: Sample) -> Converted:
    from qalora_plugin.conversion.export_gptq8 import export_gptq8

    out = sample.folder / "gptq8"
    export_gptq8(sample.merged, out, progress=False)
    return weights(out), sample.merged_weights, sample.base_weights


def compressed_tensors_import(sample: Sample) -> Converted:
    """Packed by compressed-tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from qalora_plugin.conversion.import_packed import import_packed

    case, opened = sample.case, sample.opened
    tensors = {name: opened.files.tensor(name) for name in opened.files.tensors if name.endswith(".weight")}
    for name, spec in opened.specs.items():
        weight = opened.weight(name)
        codes = _signed(_codes(weight), case.bits).t().contiguous()
        zeros = _signed(weight.zeros, case.bits).t().contiguous()
        tensors[f"{name}.weight_packed"] = pack_to_int32(codes, case.bits)
        tensors[f"{name}.weight_zero_point"] = pack_to_int32(zeros, case.bits, packed_dim=0)
        tensors[f"{name}.weight_scale"] = weight.scales.t().contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor([spec.out_features, spec.in_features])
        if weight.g_idx is not None:
            tensors[f"{name}.weight_g_idx"] = weight.g_idx
    scheme = {
        "num_bits": case.bits, "type": "int", "symmetric": False, "dynamic": False,
        "strategy": "group" if case.group_size > 0 else "channel",
        "group_size": case.group_size if case.group_size > 0 else None,
        "actorder": "group" if case.act_order else None,
    }  # fmt: skip
    quantization = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}, "ignore": ["lm_head"],
    }  # fmt: skip
    source = _write(sample, "compressed-tensors", tensors, quantization)
    out = sample.folder / "from-compressed-tensors"
    import_packed(source, out, progress=False)
    return weights(out), sample.base_weights, None


def awq_import(sample: Sample) -> Converted:
    """Packed as AutoAWQ's ``WQLinear_GEMM`` does: along N, eight columns a word, in the order 0 2 4 6 1 3 5 7."""
    from qalora_plugin.conversion.import_packed import import_packed

    opened = sample.opened
    tensors = {name: opened.files.tensor(name) for name in opened.files.tensors if name.endswith(".weight")}

    def pack(codes: torch.Tensor) -> torch.Tensor:
        words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= codes[:, column::8].long() << (4 * i)
        return words.to(torch.int32)

    for name in opened.specs:
        weight = opened.weight(name)
        tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"] = pack(_codes(weight)), pack(weight.zeros)
        tensors[f"{name}.scales"] = weight.scales
    quantization = {
        "quant_method": "awq", "bits": 4, "group_size": sample.case.group_size, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip
    out = sample.folder / "from-awq"
    import_packed(_write(sample, "awq", tensors, quantization), out, progress=False)
    return weights(out), sample.base_weights, None


def gguf_import(sample: GgufSample) -> Converted:
    """Dequantized by gguf-py."""
    from qalora_plugin.conversion.import_gguf import import_gguf

    out = sample.folder / "from-gguf"
    import_gguf(sample.file, out, tokenizer=str(sample.tokenizer), progress=False)
    found, wanted = weights(out), sample.weights
    return {name: found[name] for name in wanted}, wanted, None


def _codes(weight) -> torch.Tensor:
    from qalora_plugin.core.packing import unpack_rows

    return unpack_rows(weight.qweight, weight.bits)


def _signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes.int() - (1 << (bits - 1))).to(torch.int8)


def _write(sample: Sample, name: str, tensors: dict, quantization: dict):
    folder = shutil.copytree(sample.base, sample.folder / name)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ROWS = [
    Row("export", "lora", "the adapter as an ordinary LoRA, unmerged", lora),
    Row("import", "peft", "an adapter trained with PEFT's `use_qalora`, pooling as many columns as a group has", peft),
    Row("import", "official", "an adapter of the official repository, likewise", official_adapter),
    Row("import", "official", "its merged checkpoint with float zero-points, the base given", official_merge),
    Row("export", "mlx", "a merged checkpoint for MLX, scales and biases in float32", mlx_export),
    Row("export", "gptq8", "a merged checkpoint as symmetric 8-bit GPTQ, quantized again", gptq8_export),
    Row("import", "gguf", "a llama.cpp model whose linears have one type", gguf_import, cases=TYPES),
    Row("import", "awq", "an AWQ checkpoint (gemm)", awq_import, lambda case: case.bits == 4 and not case.act_order),
    Row("import", "compressed-tensors", "a pack-quantized checkpoint, asymmetric", compressed_tensors_import),
    Row("export", "gguf", "a merged checkpoint for llama.cpp and Ollama; 8 bits become F16", gguf_export),
]
