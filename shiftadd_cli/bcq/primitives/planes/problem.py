"""Binary planes for one tall matrix under one quadratic form: from weights to codes and scales.

fit each group  →  put scales on the format  →  compensated sweep  →  repeat: refit all scales jointly, put them on
the format, coordinate descent on the codes  →  keep, per row, the solution with the smallest error
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.bcq.column_updates import compensated_sweep, descend_codes
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.levels import LevelTable, codes_of, flip_negative, nearest_ranks, ranks_of, values_of
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.primitives.planes.fit import GroupFit, fit_groups
from shiftadd_cli.bcq.primitives.planes.refit import refit_scales
from shiftadd_cli.bcq.scale_formats import scale_format
from shiftadd_cli.bcq.snap import SnappedScales, matrix_scale, snap_scales


class PlaneProblem:
    """The problem of coding `weights` float32 `[out, in]` under `options` with the least error in `objective`."""

    def __init__(self, weights: Tensor, objective: Objective, options: SolverOptions) -> None:
        self.weights, self.objective, self.options = weights, objective, options
        stored = options.format
        self.bits, self.offset, self.form = stored.bits, stored.offset, scale_format(stored.scale_format)
        self.grid = ScaleGrid.resolve(len(weights), weights.shape[1], stored.group_rows, stored.group_size)
        self.row_scale = None if stored.row_scale else matrix_scale(weights)
        self.transposed = weights.T.contiguous()
        self.row_groups = self.grid.expand_rows(torch.arange(self.grid.row_groups, device=weights.device))

    def solve(self) -> tuple[Tensor, SnappedScales]:
        """Codes uint8 `[out, in]` and their scales."""
        codes, snapped, values = self._start()
        if self.options.refine_rounds:
            codes, snapped = self._refine(codes, snapped, values)
        return codes.T, snapped

    def _start(self) -> tuple[Tensor, SnappedScales, Tensor]:
        """Codes uint8 `[in, out]`, scales, and the decoded values, float32 `[in, out]`."""
        width, dynamic = self.grid.group_columns, self.options.sweep == "dynamic"
        if dynamic and self.row_scale is not None:
            return self._sweep_dynamic(self.row_scale)
        snapped = self._snap_fit(self._fit(self.weights, self.grid), self.grid, self.row_scale)
        if dynamic:
            return self._sweep_dynamic(snapped.row_scale)
        tables = self._tables(snapped)
        if self.options.sweep == "static":
            ranks, values = compensated_sweep(self.weights, self.objective, width, tables)
        else:
            ranks, values = nearest_ranks(self.transposed, tables, width)
        return codes_of(tables, width, ranks), snapped, values

    def _sweep_dynamic(self, row_scale: Tensor) -> tuple[Tensor, SnappedScales, Tensor]:
        """A sweep that fits each group from its compensated weights on reaching it (ShiftAddLLM, section 4.2)."""
        width, solved = self.grid.group_columns, {}

        def fit_on_arrival(group: int, current: Tensor) -> LevelTable:
            strip = ScaleGrid(self.grid.rows, len(current), self.grid.group_rows, len(current))
            fit = self._fit(current.T, strip, group * width, unit=row_scale)
            snapped = self._snap_fit(fit, strip, row_scale)
            table = self._tables(snapped)
            solved[group] = (snapped, table)
            return table

        ranks, values = compensated_sweep(self.weights, self.objective, width, fit_on_arrival)
        parts = [solved[group] for group in range(self.grid.column_groups)]
        offsets = [part.offsets for part, _ in parts if part.offsets is not None]
        snapped = SnappedScales(
            torch.cat([part.ratios for part, _ in parts], dim=1),
            torch.cat(offsets, dim=1) if offsets else None,
            row_scale,
        )
        codes = torch.cat(
            [codes_of(table, width, ranks[group * width :][:width]) for group, (_, table) in enumerate(parts)]
        )
        return codes, snapped, values

    def _refine(self, codes: Tensor, snapped: SnappedScales, values: Tensor) -> tuple[Tensor, SnappedScales]:
        """Alternate joint refit and coordinate descent; each row keeps its best. `codes` and `values`: `[in, out]`."""
        width, hessian = self.grid.group_columns, self.objective.damped
        best_codes, best, best_error = codes, snapped, self._row_errors(values)
        for _ in range(self.options.refine_rounds):
            scales, offsets, curvature = refit_scales(
                self.weights, hessian, codes.T, snapped.scales(), snapped.offset_values(), width
            )
            codes, scales, curvature = flip_negative(codes, scales, curvature, width)
            snapped = snap_scales(scales, offsets, curvature, self.form, fixed_row_scale=self.row_scale)
            tables = self._tables(snapped)
            values = values_of(tables, width, ranks_of(tables, width, codes))
            ranks, values = descend_codes(self.transposed, hessian, tables, width, values, self.options.descent_passes)
            codes = codes_of(tables, width, ranks)
            error = self._row_errors(values)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_codes = torch.where(better, codes, best_codes)
            best = snapped.where(better, best)
        return best_codes, best

    def _fit(self, weights: Tensor, grid: ScaleGrid, first_column: int = 0, unit: Tensor | None = None) -> GroupFit:
        """Fit every block of a grid that begins at column `first_column` of the matrix. With row scales `unit` `[R]` or
        `[1]`, every round rounds the scales to the format."""
        # The paper's greedy fit minimises plain weight error; `search` weights each input by its power.
        importance = self.objective.damped.diagonal()[first_column : first_column + grid.columns]
        if self.options.fit == "greedy":
            importance = torch.ones_like(importance)
        blocks = grid.blocks(weights)
        factor = None if unit is None else unit.view(-1, 1, 1).expand(*blocks.shape[:2], 1).reshape(-1, 1)
        blocks = blocks.reshape(-1, blocks.shape[-1])
        fit = fit_groups(
            blocks if factor is None else blocks / factor,
            grid.blocks(importance.expand_as(weights)).reshape(blocks.shape),
            self.bits,
            method=self.options.fit,
            rounds=self.options.fit_rounds,
            offset=self.offset,
            offset_limit=self.form.offset_limit,
            rounding=None if factor is None else self.form,
        )
        return fit if factor is None else fit.times(factor)

    def _snap_fit(self, fit: GroupFit, grid: ScaleGrid, row_scale: Tensor | None) -> SnappedScales:
        """Put fitted scales on the format, with each group weighted by its own normal matrix."""
        shape = (grid.row_groups, grid.column_groups)
        return snap_scales(
            fit.scales.view(*shape, -1),
            None if fit.offsets is None else fit.offsets.view(shape),
            fit.curvature.view(*shape, *fit.curvature.shape[1:]),
            self.form,
            fixed_row_scale=row_scale,
        )

    def _tables(self, snapped: SnappedScales) -> LevelTable:
        """The levels, with batch shape `[C, out]`."""
        offsets = snapped.offset_values()
        table = LevelTable.build(snapped.scales().transpose(0, 1), None if offsets is None else offsets.T)
        # Levels are sorted once per scale set, not once per row that shares it.
        return table if self.grid.group_rows == 1 else table[:, self.row_groups]

    def _row_errors(self, values: Tensor) -> Tensor:
        """The objective per row, `[out]`, for values `[in, out]`."""
        difference = self.transposed - values
        return ((self.objective.damped @ difference) * difference).sum(0)
