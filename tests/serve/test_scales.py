"""Changed scales in vLLM: every path, fused layers of which some parts have them, ranks, a whole model, reloading."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hardware import HAS_KERNEL
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
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from qalora_plugin.core.errors import QALoraError
from vllm_ext import ops
from vllm_ext.kernels import select

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def qkv(changed, sym=False, bits=4, group_size=64, scales_dtype=F16, offset_dtype=F16, order=None):
    """q, k and v; those in ``changed`` with other scales."""
    return {
        part: linear_tensors(
            size, seed, sym, "gptq", group_size, bits, order, offset_dtype, scales_dtype if part in changed else None
        )
        for seed, (part, size) in enumerate(SIZES.items())
    }


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("compute", COMPUTE, ids=str)
@pytest.mark.parametrize("changed", ["qkv", "qv"])
@pytest.mark.parametrize("order", [None, 5])
@pytest.mark.parametrize("sym", [True, False])
def test_every_path(tmp_path, sym, order, changed, compute):
    dtype, path = compute
    if path == "kernel+offsets" and not HAS_KERNEL:
        pytest.skip("vLLM has no INT4 kernel for this CPU")
    layer, y, wanted = run_qkv(tmp_path, qkv(changed, sym, order=order), "gptq", dtype, path=path)
    assert_close(y, wanted)
    assert "scales_delta" not in dict(layer.named_parameters())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bit_widths_and_float32(tmp_path, bits, group_size):
    parts = qkv("k", bits=bits, group_size=group_size, scales_dtype=F32, offset_dtype=F32)
    _, y, wanted = run_qkv(tmp_path, parts, "gptq", F32, bits, "dense")
    assert_close(y, wanted)


@pytest.mark.usefixtures("one_rank")
def test_scales_alone(tmp_path):
    """Without offsets anywhere: not what a merge writes today, but nothing forbids it."""
    _, y, wanted = run_qkv(tmp_path, qkv("qv", offset_dtype=None), "gptq", F32, path="dense")
    assert_close(y, wanted)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("bits", [4, 8])
def test_moved_zeros_are_multiplied_by_the_changed_scales(tmp_path, monkeypatch, bits):
    monkeypatch.setattr(select, "find_kernel", lambda bits, *_: KernelWithoutZeros(bits, BF16))
    monkeypatch.setattr(ops, "_SMALLEST", 1 << 40)
    _, y, wanted = run_qkv(tmp_path, qkv("qk", bits=bits), "gptq", BF16, bits, "kernel+offsets")
    assert_close(y, wanted)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel(tmp_path, act_as, ranks):
    """Columns of N a rank (q, k, v, of which k is as in the base), and groups of K (o)."""
    sizes = {"q": 256, "k": 64, "v": 64}
    parts = {
        part: linear_tensors(n, seed, False, "gptq", 64, scales_dtype=None if part == "k" else F16)
        for seed, (part, n) in enumerate(sizes.items())
    }
    o = linear_tensors(96, 7, False, "gptq", 64, scales_dtype=F16)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(9))
    q, k, v = (expected(x, tensors, "gptq") for tensors in parts.values())
    config = config_for(tmp_path, {**{f"{part}_proj": t for part, t in parts.items()}, "o_proj": o}, "gptq", "dense")
    of_o = []
    for rank in range(ranks):
        act_as(rank, ranks)
        options = {"bias": True, "params_dtype": F32, "quant_config": config}
        layer = QKVParallelLinear(K, 32, 8, 2, prefix="qkv_proj", **options)
        found = finished(layer, parts, "qkv")(x)[0]
        heads = torch.arange(2)[rank * 2 // ranks : max(rank * 2 // ranks + 1, (rank + 1) * 2 // ranks)]
        columns = (heads[:, None] * 32 + torch.arange(32)).flatten()
        assert_close(found, torch.cat([q.chunk(ranks, dim=1)[rank], k[:, columns], v[:, columns]], dim=1))
        row = RowParallelLinear(K, 96, prefix="o_proj", reduce_results=False, skip_bias_add=True, **options)
        load(row, o)
        row.quant_method.process_weights_after_loading(row)
        of_o.append(row(x.chunk(ranks, dim=1)[rank])[0])
    assert_close(sum(of_o), expected(x, o, "gptq") - o["bias"].double())


def test_missing_changes_are_refused(tmp_path):
    folder = make_merged(tmp_path, scales=("up_proj",))
    weights = load_file(folder / "offsets.safetensors")
    lost = next(name for name in weights if name.endswith("scales_delta"))
    del weights[lost]
    save_file(weights, folder / "offsets.safetensors", metadata={"format": "pt"})
    from vllm_ext.config import QALoraConfig

    config = QALoraConfig(json.loads((folder / "config.json").read_text())["quantization_config"])
    with pytest.raises(QALoraError, match=f"{lost} is missing"):
        config.maybe_update_config(str(folder))


def without_changes(folder, copy):
    """``folder`` as a merge of an untrained adapter would be: all zeros."""
    shutil.copytree(folder, copy)
    zeros = {name: torch.zeros_like(value) for name, value in load_file(folder / "offsets.safetensors").items()}
    (copy / "offsets.safetensors").unlink()
    save_file(zeros, copy / "offsets.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.e2e
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_whole_model_and_reloading(tmp_path, monkeypatch, dtype):
    """Log-probabilities against transformers, before and after the weights are exchanged under a running server."""
    if dtype == F32:
        monkeypatch.setenv("QALORA_PATH", "dense")
    folder = make_merged(tmp_path, targets=("q_proj", "o_proj"), scales=("v_proj", "mlp"))
    untrained, tokens = without_changes(folder, tmp_path / "untrained_merged"), text_tokens(6, 100)
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
