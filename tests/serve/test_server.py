"""A real HTTP server on a merged folder, with no flag about quantisation, on one rank and on two."""

import sys
from pathlib import Path

import pytest
import torch
from serve.checkpoints import make_merged
from serve.scoring import MEAN_TOLERANCE, random_tokens, score
from vllm_server import Server

pytestmark = pytest.mark.e2e
CASES = {
    "one rank": (1, {"group_size": 32}),
    # down_proj (K = 512) has a group on each rank; o_proj (K = 256) is one group, kept whole by both
    "two ranks": (2, {"group_size": 256}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_completions_have_the_log_probabilities_of_transformers(tmp_path, case):
    ranks, kwargs = CASES[case]
    folder = make_merged(tmp_path, **kwargs)
    with Server(Path(sys.prefix), folder, tmp_path / "server.log", "--dtype", "bfloat16", ranks=ranks) as server:
        answers = [server.complete(prompt, 60) for prompt in random_tokens(4, 20).tolist()]
    generated, found = (torch.tensor(part) for part in zip(*answers, strict=True))
    tokens = torch.cat([random_tokens(4, 20), generated], dim=1)
    wanted, base = (score(folder, tokens, torch.bfloat16, with_offsets)[:, 19:] for with_offsets in (True, False))
    tolerance = MEAN_TOLERANCE[torch.bfloat16]
    assert (wanted - base).abs().mean() > 4 * tolerance
    assert (found - wanted).abs().mean() <= tolerance
    assert "qalora: CPUWNA16LinearKernel" in server.log.read_text()
