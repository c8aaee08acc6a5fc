"""Real HTTP servers on a merged folder, with no flag about quantisation, and what vLLM's users rely on around them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support.merged_checkpoints import make_merged
from support.scoring import MEAN_TOLERANCE, score, text_tokens
from support.vllm_server import Server

pytestmark = pytest.mark.e2e
TOLERANCE = MEAN_TOLERANCE[torch.bfloat16]


def start(folder, log, *options, **parallel):
    return Server(Path(sys.prefix), folder, log, "--dtype", "bfloat16", "--block-size", "32", *options, **parallel)


def assert_log_probabilities_of_transformers(server, folder):
    """Over 594 tokens of text."""
    tokens = text_tokens(6, 100)
    found = torch.tensor([server.score(row) for row in tokens.tolist()])
    wanted, base = (score(folder, tokens, torch.bfloat16, with_offsets) for with_offsets in (True, False))
    assert (wanted - base).abs().mean() > 4 * TOLERANCE  # or the comparison would not see the offsets
    assert (found - wanted).abs().mean() <= TOLERANCE


def assert_completion_of_transformers(folder, prompt, completion):
    generated, found = completion
    wanted = score(folder, torch.tensor([prompt + generated]), torch.bfloat16)[0, len(prompt) - 1 :]
    assert (torch.tensor(found) - wanted).abs().mean() <= TOLERANCE


def test_compiled_with_chunked_prefill_and_prefix_caching(tmp_path):
    folder, prompt = make_merged(tmp_path), text_tokens(1, 90)[0].tolist()
    chunks = ("--no-enforce-eager", "--max-num-batched-tokens", "40")
    with start(folder, tmp_path / "server.log", *chunks) as server:
        assert_log_probabilities_of_transformers(server, folder)
        first, again = server.complete(prompt, 30), server.complete(prompt, 30)
        assert server.metric("prefix_cache_hits") >= 64
    assert_completion_of_transformers(folder, prompt, first)
    assert_completion_of_transformers(folder, prompt, again)
    assert "qalora: fused-zeros (Int4PackKernel) for 4-bit asymmetric weights" in server.log.read_text()


def test_two_ranks(tmp_path):
    # down_proj (K = 512) has a group on each rank; o_proj (K = 256) is one group, kept whole by both
    folder, prompt = make_merged(tmp_path, group_size=256), text_tokens(1, 40)[0].tolist()
    with start(folder, tmp_path / "server.log", ranks=2) as server:
        assert_log_probabilities_of_transformers(server, folder)
        completion = server.complete(prompt, 60)
    assert_completion_of_transformers(folder, prompt, completion)


def test_two_stages(tmp_path):
    """Each process has one of the two layers. (vLLM 0.32's CPU runner needs its warm-up for that: not eager.)"""
    folder, prompt = make_merged(tmp_path), text_tokens(1, 40)[0].tolist()
    with start(folder, tmp_path / "server.log", "--no-enforce-eager", stages=2) as server:
        assert_log_probabilities_of_transformers(server, folder)
        completion = server.complete(prompt, 60)
    assert_completion_of_transformers(folder, prompt, completion)


def test_drafting_for_itself(tmp_path):
    """Speculative decoding, draft and target both merged: nearly all that is drafted must be accepted."""
    folder, prompt = make_merged(tmp_path), text_tokens(1, 40)[0].tolist()
    draft = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    with start(folder, tmp_path / "server.log", "--speculative-config", json.dumps(draft)) as server:
        completion = server.complete(prompt, 60)
        drafted, accepted = (server.metric(f"spec_decode_num_{what}_tokens") for what in ("draft", "accepted"))
    assert drafted >= 30
    assert accepted >= 0.7 * drafted
    assert_completion_of_transformers(folder, prompt, completion)
