"""Checkpoints of FSDP2, of both kinds: the best one ends a run, one elsewhere is resumed, another run's is refused."""

import json
from pathlib import Path

import pytest
from support.fabricate import make_base
from support.two_processes import launch

pytestmark = pytest.mark.e2e
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("checkpoints")
    base, other = (make_base(folder / f"base {seed}", seed=seed) for seed in (1, 2))
    launch(Path(__file__).with_name("fsdp_checkpoints.py"), base, other, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_is_whole_and_so_is_a_resumed_one(ranks, kind):
    for found in (rank[kind] for rank in ranks):
        assert found["trained"] > 1e-3
        assert found["best"] == found["resumed"] == 0
        assert found["went on"] < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_run_is_refused_on_every_rank(ranks, kind):
    for found in (rank[kind] for rank in ranks):
        assert "at rank 4 and alpha/rank 2, this run has rank 4 and 16. Resume with the settings" in found["alpha"]
        assert "checkpoint-1 was trained on another base: it records" in found["base"]
