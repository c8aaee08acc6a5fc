"""Factored offsets in vLLM: every path, fused layers whose parts differ in rank and form, ranks, a whole model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hardware import HAS_KERNEL, needs_kernel
from support.merged_checkpoints import make_merged
from support.scoring import MEAN_TOLERANCE, score, text_tokens
from support.vllm_layers import (
    COMPUTE,
    SIZES,
    K,
    KernelWithoutZeros,
    assert_close,
    config_for,
    expected,
    finished,
    linear_tensors,
    load,
    run_qkv,
)  # fmt: skip
from support.vllm_scores import OPTIONS, difference, scores
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from vllm_ext import ops
from vllm_ext.config import QALoraConfig
from vllm_ext.kernels import select

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SECOND = "kernel+offsets"


def qkv(ranks, sym=False, bits=4, group_size=32, dtype=F16, order=None, scales_dtype=None):
    """q, k and v with offsets of these ranks; 0: dense, None: not adapted."""
    return {
        part: linear_tensors(
            n, seed, sym, "gptq", group_size, bits, order, None if rank is None else dtype, scales_dtype, rank or 0
        )
        for seed, ((part, n), rank) in enumerate(zip(SIZES.items(), ranks, strict=True))
    }


@pytest.fixture
def small(monkeypatch):
    """As if dense offsets were in float32 on a CPU, and so no smaller than the factors of these toys."""
    monkeypatch.setattr(ops, "_SMALLEST", 1 << 40)


@pytest.mark.usefixtures("one_rank", "small")
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, None), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("order", [None, 5])
@pytest.mark.parametrize("sym", [True, False])
def test_every_path(tmp_path, sym, order, ranks, compute):
    """Of q, k and v: one rank, several, none, and one that is dense."""
    dtype, path = compute
    if path == SECOND and not HAS_KERNEL:
        pytest.skip("vLLM has no INT4 kernel for this CPU")
    layer, y, wanted = run_qkv(tmp_path, qkv(ranks, sym, order=order), "gptq", dtype, path=path)
    assert_close(y, wanted)
    held = dict(layer.named_parameters())
    separate = isinstance(layer.quant_method.kernel, MPLinearKernel)
    assert ("offsets_a" in held) == (separate and 0 not in ranks)
    assert not {"offsets", "offsets_a"} <= held.keys()


@needs_kernel
@pytest.mark.usefixtures("one_rank", "small")
@pytest.mark.parametrize(("ranks", "factored"), [((1, 1, 1), True), ((2, 2, 2), True), ((3, 3, 3), False)])
@pytest.mark.parametrize("dtype", [F16, F32])
def test_what_is_held_is_the_smaller(tmp_path, ranks, factored, dtype):
    """Fused, the ranks add up: of 8 groups, three of 3 are more than the offsets themselves."""
    parts = qkv(ranks, True, dtype=dtype)
    layer, y, wanted = run_qkv(tmp_path, parts, "gptq", BF16, path=SECOND)
    assert (layer.offsets is None) == factored
    offsets = layer.offsets_a @ layer.offsets_b if factored else layer.offsets
    exact = torch.cat([reference.factored_offsets(t["offsets_a"], t["offsets_b"]) for t in parts.values()], dim=1)
    assert (offsets - exact).norm() <= (1e-6 if factored or dtype == F32 else 3e-4) * exact.norm()
    assert_close(y, wanted)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bit_widths_and_float32(tmp_path, bits):
    parts = qkv((2, None, 3), bits=bits, dtype=F32, scales_dtype=F16)
    _, y, wanted = run_qkv(tmp_path, parts, "gptq", F32, bits, "dense")
    assert_close(y, wanted)


@pytest.mark.usefixtures("one_rank", "small")
@pytest.mark.parametrize("bits", [4, 8])
def test_moved_zeros_join_the_product(tmp_path, monkeypatch, bits):
    monkeypatch.setattr(select, "find_kernel", lambda bits, *_: KernelWithoutZeros(bits, BF16))
    layer, y, wanted = run_qkv(tmp_path, qkv((1, 1, None), bits=bits), "gptq", BF16, bits, SECOND)
    assert layer.offsets.dtype == F32
    assert_close(y, wanted)


@pytest.mark.usefixtures("one_rank", "small")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("path", ["dense", pytest.param(SECOND, marks=needs_kernel)])
def test_tensor_parallel(tmp_path, act_as, ranks, path):
    """Columns of N a rank (q, k, v, of which v is not adapted), and groups of K (o)."""
    dtype = F32 if path == "dense" else BF16
    parts = {
        part: linear_tensors(n, seed, False, "gptq", 32, rank=rank, offset_dtype=F16 if rank else None)
        for seed, (part, n, rank) in enumerate((("q", 512, 2), ("k", 128, 1), ("v", 128, 0)))
    }
    o = linear_tensors(128, 7, False, "gptq", 32, rank=1)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(9)).to(dtype)
    q, k, v = (expected(x, tensors, "gptq") for tensors in parts.values())
    config = config_for(tmp_path, {**{f"{part}_proj": t for part, t in parts.items()}, "o_proj": o}, "gptq", path)
    of_o = []
    for rank in range(ranks):
        act_as(rank, ranks)
        options = {"bias": True, "params_dtype": dtype, "quant_config": config}
        layer = QKVParallelLinear(K, 64, 8, 2, prefix="qkv_proj", **options)
        found = finished(layer, parts, "qkv")(x)[0]
        heads = torch.arange(2)[rank * 2 // ranks : max(rank * 2 // ranks + 1, (rank + 1) * 2 // ranks)]
        columns = (heads[:, None] * 64 + torch.arange(64)).flatten()
        assert_close(found, torch.cat([q.chunk(ranks, dim=1)[rank], k[:, columns], v[:, columns]], dim=1))
        row = RowParallelLinear(K, 128, prefix="o_proj", reduce_results=False, skip_bias_add=True, **options)
        load(row, o)
        row.quant_method.process_weights_after_loading(row)
        assert (getattr(row, "offsets_a", None) is not None) == (path == SECOND)
        of_o.append(row(x.chunk(ranks, dim=1)[rank].contiguous())[0])
    assert_close(sum(one.double() for one in of_o).to(dtype), expected(x, o, "gptq") - o["bias"].double())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["offsets_a", "offsets_b"])
@pytest.mark.parametrize("part", ["q", "v"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, part, name, bad):
    parts = qkv((1, 2, 1))
    parts[part][name][0, -1] = bad
    with pytest.raises(QALoraError, match=rf"^attn\.{part}_proj\.{name} holds NaN or Inf \(served as attn\.qkv_proj\)"):
        run_qkv(tmp_path, parts, "gptq", BF16)


@pytest.mark.parametrize("lost", ["offsets_a", "offsets_b"])
def test_half_a_pair_is_refused(tmp_path, lost):
    folder = make_merged(tmp_path, factored=("up_proj",))
    weights = load_file(folder / "offsets.safetensors")
    name = next(name for name in weights if name.endswith(lost))
    del weights[name]
    save_file(weights, folder / "offsets.safetensors", metadata={"format": "pt"})
    config = QALoraConfig(json.loads((folder / "config.json").read_text())["quantization_config"])
    with pytest.raises(QALoraError, match=f"but {lost} is missing: offsets are the product of both"):
        config.maybe_update_config(str(folder))


def test_missing_factors_are_refused(tmp_path):
    folder = make_merged(tmp_path, factored=("up_proj", "q_proj"))
    weights = load_file(folder / "offsets.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if not ("layers.1" in name and ".up_proj." in name)}
    save_file(weights, folder / "offsets.safetensors", metadata={"format": "pt"})
    config = QALoraConfig(json.loads((folder / "config.json").read_text())["quantization_config"])
    with pytest.raises(QALoraError, match=r"layers\.1\.mlp\.up_proj\.offsets_[ab] is missing"):
        config.maybe_update_config(str(folder))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("dtype", "path"), [(BF16, None), pytest.param(BF16, SECOND, marks=needs_kernel), (F32, "dense")], ids=str
)
def test_whole_model_and_reloading(tmp_path, monkeypatch, dtype, path):
    """Log-probabilities against transformers, before and after the weights are exchanged under a running server."""
    if path:
        monkeypatch.setenv("QALORA_PATH", path)
    folder = make_merged(tmp_path, factored=("q_proj", "v_proj", "o_proj", "mlp"))
    untrained, tokens = shutil.copytree(folder, tmp_path / "untrained_merged"), text_tokens(6, 100)
    zeros = {name: torch.zeros_like(value) for name, value in load_file(folder / "offsets.safetensors").items()}
    (untrained / "offsets.safetensors").unlink()
    save_file(zeros, untrained / "offsets.safetensors", metadata={"format": "pt"})
    llm = LLM(str(untrained), dtype=str(dtype).removeprefix("torch."), **OPTIONS)
    before, plain = score(untrained, tokens, dtype), scores(llm, tokens)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    found, wanted = scores(llm, tokens), score(folder, tokens, dtype)
    del llm
    cleanup_dist_env_and_memory()
    assert difference(plain, before) <= MEAN_TOLERANCE[dtype]
    assert difference(wanted, score(folder, tokens, dtype, with_offsets=False)) > 4 * MEAN_TOLERANCE[dtype]
    assert difference(wanted, before) > 4 * MEAN_TOLERANCE[dtype]
    assert difference(found, wanted) <= MEAN_TOLERANCE[dtype]
