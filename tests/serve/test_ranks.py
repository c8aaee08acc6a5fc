"""Each tensor-parallel rank's layer against its part of the reference's output, rank by rank in one process."""

import pytest
import torch
from support.vllm_layers import K, assert_close, config_for, expected, finished, linear_tensors
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_qkv_with_fewer_key_heads_than_ranks(tmp_path, act_as, bits, ranks):
    """8 query and 2 key heads of 32: four ranks share two key heads. k has no adapter, v no ``g_idx``."""
    parts = {
        "q": linear_tensors(256, 0, False, "gptq", 64, bits),
        "k": linear_tensors(64, 1, False, "gptq", 64, bits, offset_dtype=None),
        "v": linear_tensors(64, 2, False, "gptq", 64, bits),
    }
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(9))
    q, k, v = (expected(x, tensors, "gptq", bits) for tensors in parts.values())
    del parts["v"]["g_idx"]
    config = config_for(tmp_path, {f"{part}_proj": tensors for part, tensors in parts.items()}, "gptq", "dense")
    for rank in range(ranks):
        act_as(rank, ranks)
        layer = QKVParallelLinear(
            K, 32, 8, 2, bias=True, params_dtype=torch.float32, quant_config=config, prefix="qkv_proj"
        )
        found = finished(layer, parts, "qkv")(x)[0]
        heads = torch.arange(2)[rank * 2 // ranks : max(rank * 2 // ranks + 1, (rank + 1) * 2 // ranks)]
        columns = (heads[:, None] * 32 + torch.arange(32)).flatten()
        wanted = [q.chunk(ranks, dim=1)[rank], k[:, columns], v[:, columns]]
        assert_close(found, torch.cat(wanted, dim=1))


def test_shares_smaller_than_a_word_of_zeros(tmp_path, act_as):
    """A word of packed 4-bit zero-points is eight columns wide; here a rank has four."""
    parts = {f"{part}_proj": linear_tensors(16, seed, False, "gptq", 64) for seed, part in enumerate(("gate", "up"))}
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(9))
    outputs = [expected(x, tensors, "gptq") for tensors in parts.values()]
    config = config_for(tmp_path, parts, "gptq", "dense")
    config.packed_modules_mapping = {"gate_up_proj": list(parts)}
    for rank in range(4):
        act_as(rank, 4)
        layer = MergedColumnParallelLinear(
            K, [16, 16], bias=True, params_dtype=torch.float32, quant_config=config, prefix="gate_up_proj"
        )
        found = finished(layer, parts, range(2))(x)[0]
        assert_close(found, torch.cat([output.chunk(4, dim=1)[rank] for output in outputs], dim=1))
