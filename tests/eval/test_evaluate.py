"""Losses, top-1 and divergence, against float64 sums over one sequence at a time."""

from types import SimpleNamespace

import pytest
import torch

from qalora_plugin import load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval import evaluate
from qalora_plugin.eval.evaluate import Measured, looks_ahead, mean_loss, stored_logits
from qalora_plugin.eval.examples import Example

GENERATOR = torch.Generator().manual_seed(0)
EXAMPLES = [
    Example(torch.randint(4, 100, (length,), generator=GENERATOR).tolist(), start)
    for length, start in ((40, 1), (7, 5), (23, 22), (64, 30), (41, 1))
]


@pytest.fixture(scope="module")
def models(base, merged):
    return [load_base(folder, dtype=torch.float32).eval() for folder in (base, merged)]


@torch.no_grad()
def log_p(model, example):
    logits = model(input_ids=torch.tensor([example.ids])).logits[0].double()
    return logits.log_softmax(-1)[example.start - 1 : -1], torch.tensor(example.ids[example.start :])


@pytest.mark.parametrize("batch", [1, 100, 1000])
def test_means_are_over_the_tokens_that_count(models, batch):
    found = mean_loss(models[1], EXAMPLES, batch=batch)
    ours = [log_p(models[1], example) for example in EXAMPLES]
    targets = torch.cat([wanted for _, wanted in ours])
    every = torch.cat([rows for rows, _ in ours])
    assert found.tokens == len(targets) == 39 + 2 + 1 + 34 + 40
    assert found.loss == pytest.approx(-every.gather(1, targets[:, None]).mean().item(), abs=1e-5)
    assert found.top1 == (every.argmax(-1) == targets).double().mean()
    assert found.perplexity == pytest.approx(2.718281828**found.loss)
    assert found.kl is None


def test_divergence_is_exact(models):
    with stored_logits(models[0], EXAMPLES) as stored:
        found = mean_loss(models[1], EXAMPLES, stored, batch=100)
        same = mean_loss(models[0], EXAMPLES, stored, batch=1)
    pairs = [(log_p(models[0], example)[0], log_p(models[1], example)[0]) for example in EXAMPLES]
    expected = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean().item()
    assert found.kl == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert expected > 1e-3
    assert found.kl_tokens == found.tokens
    assert same.kl == pytest.approx(0, abs=1e-6)


def test_divergence_is_bounded(models):
    with stored_logits(models[0], EXAMPLES, tokens=45) as stored:
        assert list(stored.rows) == [0, 1, 2]  # whole examples, in the order they came
        found = mean_loss(models[1], EXAMPLES, stored)
    assert found.kl_tokens == 42
    assert found.loss == mean_loss(models[1], EXAMPLES).loss
    with stored_logits(models[0], EXAMPLES, tokens=1) as stored:
        assert stored.tokens == 39  # one at least


def test_no_room_for_the_reference(models, monkeypatch):
    def full(place, needed):
        raise QALoraError(f"{place}: {needed}")

    monkeypatch.setattr(evaluate, "require_space", full)
    with pytest.raises(QALoraError, match=f"{4 * 116 * 128}$"), stored_logits(models[0], EXAMPLES):
        pass


def test_another_vocabulary(models):
    with stored_logits(models[0], EXAMPLES) as stored:
        stored.array = stored.array[:, :100]
        with pytest.raises(QALoraError, match="100 logits a token, this model 128"):
            mean_loss(models[1], EXAMPLES, stored)


def test_a_disk_that_is_full(models, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluate.np, "memmap", full)
    with pytest.raises(QALoraError, match="No space left on device"), stored_logits(models[0], EXAMPLES):
        pass


def test_a_model_in_training_stays_so(models):
    models[0].train()
    try:
        mean_loss(models[0], EXAMPLES)
        assert models[0].training
        assert models[0].model.layers[0].training
    finally:
        models[0].eval()


class SeesAll(torch.nn.Module):
    """Gives every token the mean of all."""

    device = torch.device("cpu")

    def __init__(self, causal):
        super().__init__()
        self.embedding, self.causal = torch.nn.Embedding(8, 8), causal

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        means = x.cumsum(1) if self.causal else x.mean(1, keepdim=True).expand_as(x)
        return SimpleNamespace(logits=means)


def test_models_that_see_what_they_should_predict(models):
    assert looks_ahead(SeesAll(causal=False))
    assert not looks_ahead(SeesAll(causal=True))
    assert not any(map(looks_ahead, models))


def test_a_model_that_is_lost():
    assert Measured(1000.0, 0, 1).perplexity == float("inf")


def test_nothing_to_measure(models):
    for examples in ([], [Example([5])], [Example([])]):
        with pytest.raises(QALoraError, match="no example has a token that counts"):
            mean_loss(models[0], examples)
        with pytest.raises(QALoraError, match="no example has a token that counts"), stored_logits(models[0], examples):
            pass
