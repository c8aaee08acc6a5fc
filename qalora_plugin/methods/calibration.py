"""Where an adapter may start instead of at zero: base + adapter as close to the 16-bit weight as its rank allows.

Close is meant on calibration text: the norm is that of H = XᵀX/T, X the inputs of the linear, so the error is the mean
square of what its output is off by. One step of arithmetic, no training. After QuAILoRA (arXiv 2410.14713) and CLoQ
(arXiv 2501.18475), which do it for a LoRA; here for offsets and scales of groups (:mod:`.normal_equations`):

0.  The weight to come near to is the 16-bit one, changed to make up for what the linears before it do to its inputs.
1.  Every output feature on its own: the offsets and changes of scales that would be best without a limit of rank.
2.  D, C: the changes of scales cut down to rank R, in the norm that is left for them when offsets follow.
3.  A, B: the best offsets of rank R beside these scales, CLoQ's closed form; in units of the scales, where they train.
4.  An output feature that came out worse than it was (the norms above are damped) keeps its zeros.

Without scales only the third step is left.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from qalora_plugin.core.reference import dequantize
from qalora_plugin.core.weight import GroupwiseWeight
from qalora_plugin.methods.normal_equations import BLOCK, NormalEquations, solve

_DAMPING = 0.01  # of H's mean diagonal, as GPTQ's: what calibration text says nothing of should not be made worse
_SHARE = 0.25
_NEGLIGIBLE = 1e-9  # of the largest: rounding


class Factors(NamedTuple):
    """Of one linear, float32; D and C are None without scales.

    Attributes:
        a: ``[R, G]``. b: ``[N, R]``. d: ``[G, R]``. c: ``[R, N]``.
        before, after: the error of base and of base + adapter, ``Σ_n ‖w − w'‖²`` in the norm of H.
    """

    a: Tensor
    b: Tensor
    d: Tensor | None
    c: Tensor | None
    before: float
    after: float


def made_up(dense: Tensor, hessian: Tensor, drift: Tensor, tokens: int) -> Tensor:
    """The weight ``[K, N]`` that makes up, too, for what the linears before it do to its inputs.

    Of the inputs X in the quantized model its outputs are nearest to ``X₁₆·dense``, what the 16-bit model has there:
    ``dense + (XᵀX)⁻¹Xᵀ(X₁₆ − X)·dense``. A quarter of that change is taken, as by GPTAQ (arXiv 2504.02692): of a whole
    model it was better than all on text that was held out. K columns explain K of T tokens by chance: less by that.

    Args:
        hessian, drift, tokens: of :class:`.block_inputs.Moments`.
    """
    share = _SHARE * (1 - len(dense) / tokens)
    if share <= 0:
        return dense.to(hessian.dtype)
    damped = hessian.double()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp(min=1e-30))
    change = torch.linalg.solve(damped, drift.double() @ dense.double())
    return (dense.double() + share * change).to(hessian.dtype)


@torch.no_grad()
def calibrated_factors(
    weight: GroupwiseWeight, dense: Tensor, hessian: Tensor, rank: int, scaling: float, with_scales: bool
) -> Factors:
    """The adapter that brings ``weight`` closest to ``dense``; never further away, in any output feature.

    Directions that the rank has to spare (R > G) are as training starts them: random in A and D, zero in B and C.
    Temporaries beside the inputs, on their device: two of ``[K, K]``, eight of ``[K, N]`` (float32), and 0.7 GB.

    Args:
        weight: of the base. dense: the 16-bit weight, ``[K, N]``. hessian: ``XᵀX/T`` ``[K, K]``, float32 or better.
        rank: R. scaling: α/R.
    """
    groups, order = weight.groups, weight.group_order
    steps = dequantize(weight._replace(offsets=None), hessian.dtype)
    lacking = dense.to(hessian.dtype) - dequantize(weight, hessian.dtype)
    if order is not None:  # columns sorted by group
        steps, lacking, hessian = steps[order], lacking[order], hessian[order][:, order]
    before = _errors(hessian, lacking)
    level = hessian.diagonal().mean()
    if not level > 0:  # nothing came here
        level = torch.ones_like(level)
    damped = hessian.clone()
    damped.diagonal().add_(_DAMPING * level)
    equations = NormalEquations(damped, steps, lacking, groups)
    norm = _Norm(equations.offsets_gram)

    if with_scales:
        d, c = _best_scales(equations, norm, rank)
        equations.fix_scales(d @ c)
        unit = weight.scales.double()
        basis, b = _best_in_steps(equations, norm, unit, rank)
        left = lacking - equations.spread(unit * (basis @ b)) - steps * equations.spread(d @ c)
    else:
        basis, b = norm.truncated(norm.dual(equations.offsets_side), rank)
        left = lacking - equations.spread(basis @ b)
    after = _errors(hessian, left)
    better = after < before
    a, b = _started(basis, b * better, rank)
    found_d, found_c = _started(d, c * better, rank) if with_scales else (None, None)
    errors = before.sum().item(), torch.where(better, after, before).sum().item()
    return Factors(a.t().contiguous(), (b.t() / scaling).contiguous(), found_d, found_c, *errors)


class _Norm:
    """``‖x‖² = xᵀ·gram·x``, of a ``gram`` ``[G, G]`` that may be singular up to rounding."""

    def __init__(self, gram: Tensor):
        values, self.vectors = torch.linalg.eigh(gram)
        self.roots = values.clamp(min=max(values[-1].item(), 1e-30) * _NEGLIGIBLE).sqrt()[:, None]

    def primal(self, x: Tensor) -> Tensor:
        """``[G, …]`` to where the norm is the Euclidean one."""
        return self.roots * (self.vectors.t() @ x)

    def dual(self, side: Tensor) -> Tensor:
        """:meth:`primal` of the x of ``gram·x = side``."""
        return (self.vectors.t() @ side) / self.roots

    def solution(self, side: Tensor) -> Tensor:
        """The x of ``gram·x = side``."""
        return self.vectors @ (self.dual(side) / self.roots)

    def truncated(self, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The nearest product of that rank, ``[G, r]·[r, N]``, to an x given as :meth:`primal`."""
        _, vectors = torch.linalg.eigh(x @ x.t())
        directions = vectors[:, -rank:].flip(1)
        return self.vectors @ (directions / self.roots), directions.t() @ x


def _best_scales(equations: NormalEquations, norm: _Norm, rank: int) -> tuple[Tensor, Tensor]:
    """D and C, ``[G, r]`` and ``[r, N]``, best when the offsets beside them are free.

    Output features differ in the norm of their changes. The mean norm is used for all, with a weight for each.
    """
    groups = equations.groups
    change = torch.empty_like(equations.scales_side)
    gram, weights = torch.zeros_like(equations.offsets_gram), torch.empty_like(change[0])
    for block, matrices, sides in equations.blocks():
        own = matrices[:, groups:, groups:]
        weights[block] = own.diagonal(dim1=1, dim2=2).mean(1)
        through_offsets = norm.dual(matrices[:, :groups, groups:].transpose(0, 1).flatten(1)).unflatten(1, (-1, groups))
        gram += own.sum(0) - torch.einsum("gnx,gny->xy", through_offsets, through_offsets)
        change[:, block] = solve(matrices, sides)[:, groups:].t()
    of_scales = _Norm(gram)
    roots = weights.clamp(min=max(weights.max().item(), 1e-30) * _NEGLIGIBLE).sqrt()
    d, c = of_scales.truncated(of_scales.primal(change) * roots, rank)
    return d, c / roots


def _best_in_steps(equations: NormalEquations, norm: _Norm, unit: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B, ``[G, r]`` and ``[r, N]``, of the best offsets ``unit ⊙ A·B``.

    No closed form has a weight for each entry. A is best for the unit that a product of one row and one column comes
    near to; B is then best for the unit itself, one output feature at a time.
    """
    columns = unit.abs().mean(0).clamp(min=1e-30)
    rows = (unit.abs() / columns).mean(1).clamp(min=1e-30)
    near = _Norm(rows[:, None] * equations.offsets_gram * rows)
    wanted = torch.where(unit != 0, norm.solution(equations.offsets_side) / unit, 0)
    basis, b = near.truncated(near.primal(wanted) * columns, rank)
    for block in torch.arange(unit.shape[1], device=unit.device).split(max(1, BLOCK // basis.numel())):
        spread = unit[:, block, None] * basis[:, None]  # [G, n, r]
        gram = (equations.offsets_gram @ spread.flatten(1)).view_as(spread)
        sides = torch.einsum("gnr,gn->nr", spread, equations.offsets_side[:, block])
        b[:, block] = solve(torch.einsum("gnr,gns->nrs", spread, gram), sides).t()
    return basis, b


def _started(basis: Tensor, coefficients: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``[G, r]`` and ``[r, N]`` → ``[G, R]`` and ``[R, N]``, same product; columns of the first of kaiming's size."""
    (groups, found), bound = basis.shape, basis.shape[0] ** -0.5
    size = basis.norm(dim=0) * 3**0.5
    first = basis.new_empty(groups, rank, dtype=torch.float32).uniform_(-bound, bound)
    second = basis.new_zeros(rank, coefficients.shape[1], dtype=torch.float32)
    first[:, :found] = basis / size
    second[:found] = coefficients * size[:, None]
    return first, second


def _errors(hessian: Tensor, residual: Tensor) -> Tensor:
    """``‖residual[:, n]‖²`` in the norm of H, ``[N]``."""
    return ((hessian @ residual) * residual).sum(0)
