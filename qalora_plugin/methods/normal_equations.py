"""Least squares for what an adapter may change of a quantized weight, one problem an output feature.

    min over o, m of  ‖Δ[:,n] − P·o[:,n] − v[:,n]⊙(P·m[:,n])‖² in the norm of H

Δ ``[K, N]`` is what the weight lacks, v = scales·(q − zeros) ``[K, N]`` what its scales make, P ``[K, G]`` has a one
for the group of each column: o are changes of offsets, m of scales in parts of what they are. Columns of K are sorted
by group here, so that P is a view. Letters: ``K N G g R`` as in :mod:`qalora_plugin.core.weight`; n of N at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 2**24  # numbers that a temporary may have: at most 128 MiB each, four or five at a time
_RIDGE = 1e-4  # added to a diagonal of ones: a group of equal codes has an offset and a scale that do the same


class NormalEquations:
    """Of one weight.

    Args:
        hessian: ``[K, K]``, symmetric and positive definite. steps: v. residual: Δ. groups: G.
    """

    def __init__(self, hessian: Tensor, steps: Tensor, residual: Tensor, groups: int):
        self.hessian, self.steps, self.groups = hessian, steps, groups
        self.pooled = _sums(hessian.t(), groups).t()  # H·P [K, G], of a symmetric H
        self.offsets_gram = _sums(self.pooled, groups).double()  # PᵀHP [G, G]
        product = hessian @ residual
        self.offsets_side = _sums(product, groups).double()  # PᵀHΔ [G, N]
        self.scales_side = _sums(product.mul_(steps), groups).double()  # Pᵀ(v⊙HΔ) [G, N]

    def spread(self, change: Tensor) -> Tensor:
        """``P·change``: of groups to columns, ``[G, N] → [K, N]``, in the dtype of v."""
        return change.to(self.steps.dtype).repeat_interleave(len(self.steps) // self.groups, 0)

    def fix_scales(self, change: Tensor) -> None:
        """Take m as ``change`` ``[G, N]``: what is left for offsets to make up is less."""
        self.offsets_side -= (self.pooled.t() @ (self.steps * self.spread(change))).double()

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows n of N, their matrices ``[n, 2G, 2G]`` and right sides ``[n, 2G]``: offsets first, then scales."""
        rows = max(1, BLOCK // (2 * self.groups) ** 2)
        for start in range(0, self.steps.shape[1], rows):
            block = slice(start, start + rows)
            sides = torch.cat([self.offsets_side[:, block], self.scales_side[:, block]]).t()
            yield block, self._matrices(self.steps[:, block]), sides

    def _matrices(self, steps: Tensor) -> Tensor:
        """``[P, v⊙P]ᵀ·H·[P, v⊙P]`` ``[n, 2G, 2G]``, float64, of v ``[K, n]``."""
        (k, n), groups = steps.shape, self.groups
        size = k // groups
        out = steps.new_empty(n, 2 * groups, 2 * groups, dtype=torch.float64)
        out[:, :groups, :groups] = self.offsets_gram
        grouped = steps.view(groups, size, n)
        at_once = max(1, BLOCK // (k * n))
        for start in range(0, groups, at_once):
            stop = min(start + at_once, groups)
            columns = self.hessian[:, start * size : stop * size].unflatten(1, (-1, size)).transpose(0, 1)
            product = torch.bmm(columns, grouped[start:stop]).unflatten(1, (groups, size))  # H·v by groups
            here = slice(groups + start, groups + stop)
            out[:, :groups, here] = product.sum(2).permute(2, 1, 0)
            out[:, groups:, here] = product.mul_(grouped).sum(2).permute(2, 1, 0)
        out[:, groups:, :groups] = out[:, :groups, groups:].mT
        return out


def solve(matrices: Tensor, sides: Tensor) -> Tensor:
    """``x`` ``[n, S]`` of ``matrices·x = sides``, each scaled to a diagonal of ones and damped; zero where it fails.

    Args:
        matrices: ``[n, S, S]``, positive semidefinite up to rounding; overwritten. sides: ``[n, S]``.
    """
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()  # 0 for what has no effect
    matrices *= scale[:, :, None]
    matrices *= scale[:, None, :]
    matrices.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    factor, failed = torch.linalg.cholesky_ex(matrices)
    found = torch.cholesky_solve((sides * scale)[..., None], factor)[..., 0] * scale
    return torch.where((failed == 0)[:, None] & found.isfinite().all(1, keepdim=True), found, 0)


def _sums(x: Tensor, groups: int) -> Tensor:
    """Rows summed by group, ``[K, …] → [G, …]``."""
    return x.unflatten(0, (groups, -1)).sum(1)
