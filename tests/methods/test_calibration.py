"""Factors of a calibrated start, against least squares in float64."""

import pytest
import torch
from support.layers import make_layer

from qalora_plugin.core import reference
from qalora_plugin.methods import normal_equations
from qalora_plugin.methods.calibration import calibrated_factors, made_up

K, N, SCALING = 96, 64, 0.5


def problem(bits=2, act_order=False, dead=0, dtype=torch.float64, **layer):
    """A base, a 16-bit weight near it, and H of correlated inputs, the first ``dead`` of them zero."""
    weight = make_layer(K, N, bits, 16, act_order=act_order, seed=1, **layer).quantized
    generator = torch.Generator().manual_seed(2)
    noise, mix, x = (torch.randn(*size, generator=generator, dtype=dtype) for size in ((K, N), (K, K), (400, K)))
    base = reference.dequantize(weight)
    step = weight.scales.double()[reference.column_groups(weight)]
    dense = base * 1.03 + 0.4 * step * (noise + 0.5)
    x = x @ (torch.eye(K, dtype=dtype) + 0.3 * mix)
    x[:, :dead] = 0
    return weight, dense, x.t() @ x / len(x)


def adapted(weight, factors):
    """``w'`` ``[K, N]``, float64, by the reference."""
    unit = None if factors.d is None else weight.scales
    offsets = reference.adapter_offsets(factors.a, factors.b, SCALING, unit)
    found = reference.dequantize(weight)
    if factors.d is not None:
        found = reference.scaled_weight(weight, factors.d, factors.c)
    return found + offsets[reference.column_groups(weight)]


def errors(hessian, residual):
    return ((hessian.double() @ residual) * residual).sum(0)


def damped(hessian):
    return hessian + torch.eye(K, dtype=hessian.dtype) * 0.01 * hessian.diagonal().mean()


def optimum(weight, dense, hessian, with_scales):
    """Smallest error of every output feature, by least squares on a square root of H."""
    root = torch.linalg.cholesky(hessian, upper=True)
    group = reference.column_groups(weight)
    pooling = torch.nn.functional.one_hot(group, weight.groups).double()
    steps, lacking = reference.dequantize(weight._replace(offsets=None)), dense - reference.dequantize(weight)
    found = []
    for n in range(N):
        design = torch.cat([pooling, steps[:, n, None] * pooling], 1) if with_scales else pooling
        best = torch.linalg.lstsq(root @ design, root @ lacking[:, n], driver="gelsd").solution
        found.append((root @ (lacking[:, n] - design @ best)).square().sum())
    return torch.stack(found)


@pytest.mark.parametrize("with_scales", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        {"bits": 2}, {"bits": 3}, {"bits": 4}, {"bits": 8}, {"act_order": True}, {"offsets": True},
        {"negative_scales": True}, {"bits": 3, "act_order": True, "offsets": torch.float32},
    ],
    ids=str,
)  # fmt: skip
def test_full_rank_reaches_least_squares(kind, with_scales):
    weight, dense, hessian = problem(**kind)
    factors = calibrated_factors(weight, dense, hessian, weight.groups, SCALING, with_scales)
    left = dense - adapted(weight, factors)
    best = optimum(weight, dense, damped(hessian), with_scales)
    assert (errors(damped(hessian), left) / best).max() < 1.001
    before = errors(hessian, dense - reference.dequantize(weight)).sum()
    assert factors.before == pytest.approx(before.item(), rel=1e-6)
    assert factors.after == pytest.approx(errors(hessian, left).sum().item(), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
@pytest.mark.parametrize("with_scales", [False, True])
def test_never_further_away_and_closer_with_rank(rank, with_scales):
    """In any output feature; R > G leaves directions that training can use."""
    weight, dense, hessian = problem()
    factors = calibrated_factors(weight, dense, hessian, rank, SCALING, with_scales)
    assert (factors.a.shape, factors.b.shape) == ((rank, weight.groups), (N, rank))
    still = errors(hessian, dense - reference.dequantize(weight))
    assert (errors(hessian, dense - adapted(weight, factors)) <= still * (1 + 1e-6)).all()
    assert factors.after < 0.97 * factors.before
    more = calibrated_factors(weight, dense, hessian, rank + 1, SCALING, with_scales)
    assert more.after <= factors.after * (1 + 1e-6)
    bound = weight.groups**-0.5
    first, second = factors.a[weight.groups :], factors.b[:, weight.groups :]
    assert (first.abs() <= bound).all()
    assert not second.any()
    assert first.numel() == 0 or first.std() > 0.3 * bound
    assert torch.allclose(factors.a[:3].norm(dim=1), torch.tensor(3**-0.5))
    if with_scales:
        assert (factors.d.shape, factors.c.shape) == ((weight.groups, rank), (rank, N))
        assert not factors.c[weight.groups :].any()
        plain = calibrated_factors(weight, dense, hessian, rank, SCALING, False)
        assert factors.after < plain.after


def test_offsets_alone_are_the_best_of_their_rank():
    """Against the truncated SVD in the norm of PᵀHP, CLoQ's closed form."""
    weight, dense, hessian = problem()
    factors = calibrated_factors(weight, dense, hessian, 2, SCALING, False)
    pooling = torch.nn.functional.one_hot(reference.column_groups(weight), weight.groups).double()
    h = damped(hessian)
    gram, lacking = pooling.t() @ h @ pooling, dense - reference.dequantize(weight)
    free = torch.linalg.solve(gram, pooling.t() @ h @ lacking)
    values = torch.linalg.svdvals(torch.linalg.cholesky(gram).t() @ free)
    best = optimum(weight, dense, h, False).sum() + values[2:].square().sum()
    assert errors(h, dense - adapted(weight, factors)).sum() == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize("dead", [5, 32, K])
def test_inputs_that_never_come(dead):
    """A few columns, whole groups, all of them."""
    weight, dense, hessian = problem(dead=dead)
    factors = calibrated_factors(weight, dense, hessian, 4, SCALING, True)
    assert all(factor.isfinite().all() for factor in factors[:4])
    still = errors(hessian, dense - reference.dequantize(weight))
    assert (errors(hessian, dense - adapted(weight, factors)) <= still * (1 + 1e-6)).all()
    if dead == K:
        assert not factors.b.any()
        assert not factors.c.any()


def test_a_base_that_is_right_already():
    weight, _, hessian = problem()
    factors = calibrated_factors(weight, reference.dequantize(weight), hessian, 4, SCALING, True)
    assert not factors.b.any()
    assert not factors.c.any()


def test_blocks_and_float32_change_nothing(monkeypatch):
    weight, dense, hessian = problem()
    whole = calibrated_factors(weight, dense, hessian, 4, SCALING, True)
    monkeypatch.setattr(normal_equations, "BLOCK", 2000)  # rows and groups, both in several parts
    parts = calibrated_factors(weight, dense, hessian, 4, SCALING, True)
    single = calibrated_factors(weight, dense.bfloat16(), hessian.float(), 4, SCALING, True)
    assert parts.after == pytest.approx(whole.after, rel=1e-9)
    assert single.after == pytest.approx(whole.after, rel=0.02)  # of a weight rounded to bfloat16
    assert torch.allclose(adapted(weight, parts), adapted(weight, whole), atol=1e-5)


def test_scales_of_zero_stay():
    weight, dense, hessian = problem()
    weight.scales[1] = 0
    factors = calibrated_factors(weight, dense, hessian, 4, SCALING, True)
    assert all(factor.isfinite().all() for factor in factors[:4])
    assert factors.after < factors.before


def test_what_came_before_is_made_up_for():
    """By a quarter of what least squares would do, less what K columns explain of T tokens by chance."""
    generator = torch.Generator().manual_seed(0)
    x16 = torch.randn(400, 16, generator=generator, dtype=torch.float64)
    x = x16 + 0.3 * torch.randn(400, 16, generator=generator, dtype=torch.float64)
    dense = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    found = made_up(dense, x.t() @ x / 400, x.t() @ (x16 - x) / 400, 400)
    best = torch.linalg.lstsq(x, x16 @ dense).solution
    torch.testing.assert_close(
        found, dense + 0.25 * (1 - 16 / 400) * (best - dense), rtol=0.05, atol=0.02
    )  # damped by 1 %
    assert (x @ found - x16 @ dense).norm() < (x @ dense - x16 @ dense).norm()
    few = x[:16].t() @ x[:16] / 16, x[:16].t() @ (x16 - x)[:16] / 16
    assert torch.equal(made_up(dense, *few, 16), dense)
