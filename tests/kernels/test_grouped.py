"""The Triton kernels of stacked experts against the reference in float64; without a GPU interpreted."""

from pathlib import Path

import pytest
import torch
from support.layers import assert_close, make_layer
from support.nvidia_machine_code import run_uninterpreted

from qalora_plugin.core import reference
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.kernels.triton import grouped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest number. Weights are rounded to the dtype of x, sums are float32. (The interpreter's products are wrong
# in bfloat16, whose numbers it takes for integers.)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3} | ({torch.bfloat16: 8e-3} if DEVICE == "cuda" else {})
EXPERTS = 4
CHOSEN = torch.tensor([[0, 2], [2, 0], [2, 1], [2, 0], [1, 2]])  # expert 3 is idle


def stacked(k, n, bits=4, group_size=32, act_order=False):
    layers = [make_layer(k, n, bits, group_size, act_order=act_order, seed=seed).quantized for seed in range(EXPERTS)]
    tensors = [
        None if layers[0][i] is None else torch.stack([layer[i] for layer in layers]).to(DEVICE) for i in range(6)
    ]
    return GroupwiseWeight.of(tensors, bits, group_size), layers


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def tiles_of(chosen=CHOSEN):
    return grouped.Tiles.of(chosen.to(DEVICE), EXPERTS)


def dense(layers, offsets=None):
    weights = []
    for i, layer in enumerate(layers):
        added = 0 if offsets is None else offsets[i].cpu().double()[reference.column_groups(layer)]
        weights.append(reference.dequantize(layer) + added)
    return torch.stack(weights)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(5, 4, 2), (1, 128, 8), (200, 3, 1), (40, 8, 8)])
def test_tiles_hold_every_slot_once_with_its_expert(tokens, experts, k):
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    chosen = scores.topk(k).indices.to(DEVICE)
    tiles = grouped.Tiles.of(chosen, experts)
    slots, owners = tiles.slots.view(-1, tiles.block).cpu(), tiles.experts.cpu()
    assert len(slots) == len(owners)
    used = int(tiles.used) // tiles.block
    assert (slots[used:] == tiles.size).all()
    seen = {
        int(slot): int(owner) for row, owner in zip(slots, owners, strict=True) for slot in row if slot < tiles.size
    }
    assert seen == dict(enumerate(chosen.flatten().tolist()))
    assert owners[:used].tolist() == sorted(owners[:used].tolist())


@pytest.mark.parametrize("rows", ["a token", "a slot"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (2, 32), (3, 32), (8, 32), (4, 12), (3, 24), (4, 96)])
def test_multiply_and_back(bits, group_size, act_order, rows):
    """96 → 160 fill no tile; groups of 12 and 24 hold no whole periods, of 4 and 3 bits."""
    weight, layers = stacked(96, 160, bits, group_size, act_order)
    offsets = random(EXPERTS, 96 // group_size, 160) if rows == "a slot" else None
    tiles, exact = tiles_of(), dense(layers, offsets)
    slots = CHOSEN.flatten()
    for dtype in TOLERANCE if (bits, group_size) == (4, 32) else [torch.float32]:
        x = random(len(CHOSEN) if rows == "a token" else len(slots), 96, dtype=dtype)
        by_slot = x.cpu().double().repeat_interleave(len(slots) // len(x), 0)
        y = grouped.multiply(x, weight, offsets, tiles)
        assert y.dtype == dtype
        assert_close(y.cpu(), torch.einsum("sk,skn->sn", by_slot, exact[slots]), TOLERANCE[dtype])
        dy = random(len(slots), 160, dtype=dtype)
        dx = grouped.multiply_t(dy, weight, offsets, tiles)
        assert_close(dx.cpu(), torch.einsum("sn,skn->sk", dy.cpu().double(), exact[slots]), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("inner", "n"), [(3, 160), (80, 16)])
def test_products_with_factors(inner, n, dtype):
    tiles, slots = tiles_of(), CHOSEN.flatten()
    m, x, dy = (
        random(EXPERTS, n, inner).mT,
        random(len(slots) // 2, inner, dtype=dtype),
        random(len(slots), n, dtype=dtype),
    )
    by_slot = x.cpu().double().repeat_interleave(2, 0)
    wanted = torch.einsum("si,sin->sn", by_slot, m.cpu().double()[slots])
    assert_close(grouped.product(x, m, tiles).cpu(), wanted, TOLERANCE[dtype])
    each = torch.einsum("si,sn->sin", by_slot, dy.cpu().double())
    wanted = torch.zeros(EXPERTS, inner, n, dtype=torch.float64).index_add_(0, slots, each)
    found = grouped.outer(x, dy, EXPERTS, tiles)
    assert found.dtype == torch.float32
    assert_close(found.cpu(), wanted, 1e-6)
    assert not found[3].any()


@pytest.mark.parametrize("group_size", [24, 32])
def test_pool_in_act_order(group_size):
    weight, layers = stacked(96, 32, group_size=group_size, act_order=True)
    x, tiles = random(len(CHOSEN), 96), tiles_of()
    wanted = [
        reference.pool(x[s // 2].cpu().double(), reference.column_groups(layers[e]), 96 // group_size)
        for s, e in enumerate(CHOSEN.flatten().tolist())
    ]
    assert_close(grouped.pool(x, weight, tiles).cpu(), torch.stack(wanted), 1e-6)


def test_no_tokens():
    weight, _ = stacked(64, 32)
    tiles = grouped.Tiles.of(CHOSEN[:0].to(DEVICE), EXPERTS)
    assert grouped.multiply(random(0, 64), weight, None, tiles).shape == (0, 32)
    assert not grouped.outer(random(0, 2), random(0, 32), EXPERTS, tiles).any()


@pytest.mark.gpu
def test_a_cuda_graph_holds_it_all():
    """Replayed for other choices than it was captured with."""
    weight, _ = stacked(256, 256)
    x, chosen = random(len(CHOSEN), 256, dtype=torch.bfloat16), CHOSEN.to(DEVICE)

    def run():
        return grouped.multiply(x, weight, None, grouped.Tiles.of(chosen, EXPERTS))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    chosen.copy_(3 - CHOSEN)
    graph.replay()
    assert torch.equal(captured, run())


def test_kernels_compile_for_nvidia_gpus():
    run_uninterpreted(Path(__file__).with_name("compile_grouped_kernels.py"))
