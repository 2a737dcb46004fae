"""Groups of weights in ascending order, with running sums: what a round of a fit asks for, without a pass over them.

Nearest codes cut the sorted weights of a group into 2^q intervals, one per level, and the normal equations and the
error of a fit need no more of an interval than its Σ h and Σ h·w: differences of running sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import code_signs, sorted_levels
from shiftadd_cli.bcq.starts import Scales


@dataclass(frozen=True)
class NormalEquations:
    """Weighted least squares under nearest codes: `matrix` `[groups, terms, terms]` and `rhs` `[groups, terms]` with
    terms = bits, plus one for the offset; `error` float64 `[groups]` is Σ h (w − level)²."""

    matrix: Tensor
    rhs: Tensor
    error: Tensor


class SortedGroups:
    """Weights and importance h ≥ 0 of groups, float32 `[groups, size]`.

    `ordered` float32 `[groups, size]` are the weights in ascending order; `sums` float64 `[groups, 2, size + 1]` holds
    Σ h and Σ h·w of the first k of them, and `energy` float64 `[groups]` the whole Σ h·w².
    """

    def __init__(self, weights: Tensor, importance: Tensor) -> None:
        self.ordered, order = weights.contiguous().sort(dim=-1)
        # In float64: an interval is a difference of large sums, and so is the error.
        self.sums = torch.zeros(len(weights), 2, weights.shape[1] + 1, dtype=torch.float64, device=weights.device)
        terms = self.sums[:, :, 1:]
        terms[:, 0] = importance.gather(1, order)
        torch.mul(terms[:, 0], self.ordered, out=terms[:, 1])
        self.energy = (terms[:, 1] * self.ordered).sum(-1)
        torch.cumsum(terms, dim=-1, out=terms)

    def normal_equations(self, fit: Scales) -> NormalEquations:
        """Under the nearest codes of scales `[groups, bits]` and offsets."""
        levels, codes = sorted_levels(fit.scales, fit.offsets)
        midpoints = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = torch.full_like(codes, self.ordered.shape[1])
        # As in `LevelTable.nearest`, a weight on a midpoint goes to the lower level.
        ends[:, :-1] = torch.searchsorted(self.ordered, midpoints, right=True)
        below = self.sums.gather(2, ends.unsqueeze(1).expand(-1, 2, -1))
        of_rank = torch.diff(below, dim=-1, prepend=below.new_zeros(()).expand(len(below), 2, 1))
        of_code = torch.empty_like(of_rank).scatter_(2, codes.unsqueeze(1).expand(-1, 2, -1), of_rank)
        terms, products = (part.to(of_code) for part in _basis(fit.scales.shape[1], fit.offsets is not None))
        matrix = (of_code[:, 0] @ products).view(len(codes), terms.shape[1], -1)
        rhs = of_code[:, 1] @ terms
        x = fit.scales if fit.offsets is None else torch.cat((fit.scales, fit.offsets.unsqueeze(-1)), dim=-1)
        x = x.to(rhs)
        error = self.energy + (((matrix @ x.unsqueeze(-1)).squeeze(-1) - 2 * rhs) * x).sum(-1)
        return NormalEquations(matrix.to(levels), rhs.to(levels), error)


@cache
def _basis(bits: int, offset: bool) -> tuple[Tensor, Tensor]:
    """Sign of each plane in every code, and a one for the offset, `[2 ** bits, terms]`; products of two of them,
    `[2 ** bits, terms ** 2]`; both float64."""
    signs = torch.nn.functional.pad(code_signs(bits).double(), (0, int(offset)), value=1.0)
    return signs, (signs.unsqueeze(1) * signs.unsqueeze(2)).flatten(1)
