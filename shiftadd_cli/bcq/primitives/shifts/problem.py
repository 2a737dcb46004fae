"""One tall matrix of shift layers under one quadratic form: from weights to codes and row scales.

fit the scale of each row  →  compensated sweep  →  repeat: refit the scales, coordinate descent on the codes  →  keep,
per row, the solution with the smallest error

This is `planes.problem` with levels that are fixed up to their row scale and with one group per row, so that a row has
one unknown instead of several per group. The result is never worse than rounding, neither at the fitted scale nor at
the scale that maps the row's largest weight to the largest level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.bcq.column_updates import compensated_sweep, descend_codes
from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.levels import LevelTable, nearest_ranks, values_of
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.primitives.shifts.levels import ascending_levels
from shiftadd_cli.bcq.snap import SnappedScales

# Scales tried for each row, from one that puts the largest level at the row's root mean square to one that puts it at
# the row's largest weight; and rounds of least squares and nearest level for each scale.
_STARTS = 12
_ROUNDS = 2


class ShiftProblem:
    """The problem of coding `weights` float32 `[out, in]` under `options` with the least error in `objective`.

    Rows are first scaled by powers of two, so that the codes of a row do not depend on its magnitude, to the bit.
    """

    def __init__(self, weights: Tensor, objective: Objective, options: SolverOptions) -> None:
        largest = weights.abs().amax(1)
        # frexp gives a mantissa below 1. Smaller powers of two would have infinite reciprocals and gain nothing.
        exponent = torch.frexp(largest)[1].clamp(-120, 120)
        self.unit = torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)
        self.transposed = (weights / self.unit.unsqueeze(1)).T.contiguous()
        self.objective, self.options = objective, options
        levels, self.codes = ascending_levels(options.format.primitive, options.format.bits)
        self.levels, self.codes = levels.to(weights.device), self.codes.to(weights.device)
        self.width = len(self.transposed)
        self._best_error = weights.new_full((len(weights),), torch.inf)
        self._best_scale = torch.zeros_like(self._best_error)
        self._best_ranks = torch.zeros_like(self.transposed, dtype=torch.uint8)

    def solve(self) -> tuple[Tensor, SnappedScales]:
        """Codes uint8 `[out, in]` and the row scales, the only scales of a shift layer."""
        scale = self._fit()
        table, peak = self._table(scale), _stored(self.transposed.abs().amax(0) / self.levels[-1])
        self._offer(*nearest_ranks(self.transposed, self._table(peak), self.width), peak)
        ranks, values = nearest_ranks(self.transposed, table, self.width)
        self._offer(ranks, values, scale)
        if self.options.sweep != "none":
            ranks, values = compensated_sweep(self.transposed.T, self.objective, self.width, table)
            self._offer(ranks, values, scale)
        for _ in range(self.options.refine_rounds):
            scale = self._refit(values, scale)
            table = self._table(scale)
            ranks, values = descend_codes(
                self.transposed,
                self.objective.damped,
                table,
                self.width,
                values_of(table, self.width, ranks),
                self.options.descent_passes,
            )
            self._offer(ranks, values, scale)
        codes = self.codes[self._best_ranks.long()].T
        # The unit is a power of two: nothing is rounded unless the scale leaves the range of the format.
        row_scale = _stored(self._best_scale * self.unit)
        return codes, SnappedScales(row_scale.new_zeros(len(row_scale), 1, 0), None, row_scale)

    def _offer(self, ranks: Tensor, values: Tensor, scale: Tensor) -> None:
        """Keep the rows that are better than all earlier ones. `ranks` and `values`: `[in, out]`."""
        difference = self.transposed - values
        error = ((self.objective.damped @ difference) * difference).sum(0)
        better = error < self._best_error
        self._best_error = torch.where(better, error, self._best_error)
        self._best_scale = torch.where(better, scale, self._best_scale)
        self._best_ranks = torch.where(better, ranks, self._best_ranks)

    def _fit(self) -> Tensor:
        """The scale of each row, `[out]`, with the least error if inputs are weighted only by their power."""
        weights = self.transposed.T.contiguous()
        importance = self.objective.damped.diagonal()
        low = (weights.square() @ importance / importance.sum()).sqrt()
        high = weights.abs().amax(1)
        low = torch.minimum(low, high).clamp_min(torch.finfo(low.dtype).tiny)
        midpoints = (self.levels[1:] + self.levels[:-1]) / 2
        best, best_error = torch.zeros_like(high), torch.full_like(high, torch.inf)
        for start in range(_STARTS):
            top = low * (high / low) ** (start / (_STARTS - 1))
            scale = top / self.levels[-1]
            for step in range(_ROUNDS + 1):
                scale = _stored(scale)
                values = self.levels[torch.bucketize(weights / _divisor(scale).unsqueeze(1), midpoints)]
                products, squares = (weights * values) @ importance, values.square() @ importance
                # The energy of the row is left out, as it is the same for all scales.
                error = scale * (scale * squares - 2 * products)
                better = error < best_error
                best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
                if step < _ROUNDS:
                    scale = products / _divisor(squares)
        return torch.where(high > 0, best, 0.0)

    def _refit(self, values: Tensor, scale: Tensor) -> Tensor:
        """The best scale `[out]`, in the full form, for the levels of `values` `[in, out]`, which include `scale`."""
        pushed = self.objective.damped @ values
        factor = (pushed * self.transposed).sum(0) / _divisor((pushed * values).sum(0))
        return torch.where(factor > 0, _stored(factor * scale), scale)

    def _table(self, scale: Tensor) -> LevelTable:
        """The levels of one group, batch shape `[1, out]`."""
        levels = (self.levels.unsqueeze(1) * scale).unsqueeze(1)
        return LevelTable(levels, (levels[1:] + levels[:-1]) / 2, self.codes.view(-1, 1, 1).expand_as(levels))


def _stored(scale: Tensor) -> Tensor:
    """The nearest scale in the stored format."""
    return scale.bfloat16().float()


def _divisor(value: Tensor) -> Tensor:
    """`value` as a divisor, with 1 in place of 0: the dividend is 0 there too."""
    return torch.where(value > 0, value, 1.0)
