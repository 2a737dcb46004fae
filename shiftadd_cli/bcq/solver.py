"""Quantize the weights that read one input: from `[out, in]` matrices and a Hessian to their compressed form.

    fit each group  →  put scales on the format  →  compensated sweep  →  repeat: refit all scales jointly, put them on
    the format, coordinate descent on the codes  →  keep, per row, what had the smallest error

Rows of matrices with row-wise groups do not depend on each other, so all matrices that read the same input are solved as
one tall matrix. Column-wise and block forms share scales over rows and are solved one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from shiftadd_cli.bcq.descent import descend_codes
from shiftadd_cli.bcq.fit import FitMethod, GroupFit, fit_groups
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.hessian import Objective, build_objective
from shiftadd_cli.bcq.levels import LevelTable, planes_of
from shiftadd_cli.bcq.ranks import codes_of, flip_negative, nearest_ranks, ranks_of
from shiftadd_cli.bcq.refit import refit_scales
from shiftadd_cli.bcq.scale_formats import scale_format
from shiftadd_cli.bcq.snap import SnappedScales, matrix_scale, snap_scales
from shiftadd_cli.bcq.sweep import compensated_sweep
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.errors import NumericalError


@dataclass(frozen=True)
class SolverOptions:
    """What the solver is asked to do; the fields are those of the recipe, with the same names."""

    bits: int = 3
    group_size: int | str = 64
    group_rows: int | str = 1
    scale_format: str = "apot2"
    row_scale: bool = True
    offset: bool = False
    fit: FitMethod = "search"
    fit_rounds: int = 4
    weight_error: float = 0.01
    sweep: Literal["none", "static", "dynamic"] = "static"
    sweep_order: Literal["hessian", "natural"] = "hessian"
    refine_rounds: int = 3
    descent_passes: int = 2

    @classmethod
    def from_recipe(cls, recipe: object) -> SolverOptions:
        """The part of a recipe the solver needs: its fields of the same names."""
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(cls)})

    def without_data(self) -> SolverOptions:
        """The same format and fit, for a layer that no calibration input reached."""
        return replace(self, sweep="none", refine_rounds=0)

    def layout(self, rows: int, columns: int) -> PackedLayout:
        """The stored form of one `[rows, columns]` matrix under these options."""
        grid = ScaleGrid.resolve(rows, columns, self.group_rows, self.group_size)
        return PackedLayout(grid, self.bits, self.scale_format, self.row_scale, self.offset)


@dataclass(frozen=True)
class Solution:
    """A compressed matrix and its errors, both relative: ‖W − Ŵ‖² / ‖W‖², and the same in the form H (None without
    calibration)."""

    weight: QuantizedWeight
    weight_error: float
    output_error: float | None


def quantize_matrices(
    weights: Sequence[Tensor], names: Sequence[str], hessian: Tensor | None, options: SolverOptions
) -> list[Solution]:
    """Quantize matrices `[out_i, in]` that read the same input, whose second moment is `hessian` `[in, in]` or None.

    Works in float32. Raises NumericalError, naming the layer, on weights or inputs that are not finite and on Hessians
    that cannot be factorised.
    """
    matrices = [weight.float() for weight in weights]
    for matrix, name in zip(matrices, names, strict=True):
        if not torch.isfinite(matrix).all():
            raise NumericalError(f"The weight of {name} is not finite; the source checkpoint is damaged.")
    columns = matrices[0].shape[1]
    if hessian is None:
        objective = _weight_objective(columns, matrices[0].device)
    else:
        width = options.layout(matrices[0].shape[0], columns).grid.group_columns
        objective = build_objective(
            hessian.float(),
            options.weight_error,
            names[0],
            sweep=options.sweep,
            order=options.sweep_order,
            group_columns=width,
        )
    together = options.layout(1, columns).grid.group_rows == 1 and options.group_rows == 1 and options.row_scale
    batches = [torch.cat(matrices)] if together else matrices
    solved = [_Problem(batch, objective, options).solve() for batch in batches]
    solutions, start = [], 0
    for index, matrix in enumerate(matrices):
        rows = slice(start, start + len(matrix)) if together else slice(None)
        codes, snapped = solved[0] if together else solved[index]
        solutions.append(_pack(matrix, codes[rows], _rows_of(snapped, rows), options, hessian))
        start += len(matrix)
    return solutions


def _weight_objective(columns: int, device: torch.device) -> Objective:
    """The identity: without calibration only the weight error counts."""
    identity = torch.eye(columns, device=device)
    return Objective(identity, identity, torch.arange(columns, device=device), None)


def _rows_of(snapped: SnappedScales, rows: slice) -> SnappedScales:
    return SnappedScales(
        snapped.ratios[rows],
        None if snapped.offsets is None else snapped.offsets[rows],
        snapped.row_scale[rows] if len(snapped.row_scale) > 1 else snapped.row_scale,
    )


def _pack(
    matrix: Tensor, codes: Tensor, snapped: SnappedScales, options: SolverOptions, hessian: Tensor | None
) -> Solution:
    layout = options.layout(*matrix.shape)
    planes = planes_of(codes, options.bits)
    weight = QuantizedWeight.pack(layout, planes, snapped.ratios, snapped.row_scale, snapped.offsets)
    # Errors are those of the stored tensors, decoded, not of the solver's own view of them.
    difference = matrix - weight.decode()
    weight_error = _ratio(difference.square().sum(), matrix.square().sum())
    if hessian is None:
        return Solution(weight, weight_error, None)
    form = hessian.float()
    output_error = _ratio(((difference @ form) * difference).sum(), ((matrix @ form) * matrix).sum())
    return Solution(weight, weight_error, output_error)


def _ratio(error: Tensor, reference: Tensor) -> float:
    return float(error / reference) if reference > 0 else 0.0


class _Problem:
    """One tall matrix under one objective."""

    def __init__(self, weights: Tensor, objective: Objective, options: SolverOptions) -> None:
        self.weights, self.objective, self.options = weights, objective, options
        self.grid = options.layout(*weights.shape).grid
        self.form = scale_format(options.scale_format)
        self.row_scale = None if options.row_scale else matrix_scale(weights)
        self.transposed = weights.T.contiguous()

    def solve(self) -> tuple[Tensor, SnappedScales]:
        """Codes uint8 `[out, in]` and the scales they go with."""
        if self.options.sweep == "dynamic":
            return self._sweep_dynamic()
        snapped = self._snap_fit(self._fit())
        tables = self._tables(snapped)
        if self.options.sweep == "static":
            ranks, values = compensated_sweep(
                self.weights, self.objective, self.grid.group_columns, lambda group, _: tables[group]
            )
        else:
            ranks, values = nearest_ranks(self.transposed, tables, self.grid.group_columns)
        codes = codes_of(tables, self.grid.group_columns, ranks)
        if self.options.refine_rounds:
            return self._refine(codes, snapped, values)
        return codes.T, snapped

    def _refine(self, codes: Tensor, snapped: SnappedScales, values: Tensor) -> tuple[Tensor, SnappedScales]:
        """Alternate joint refit and coordinate descent; every row keeps its best. `codes` and `values`: `[in, out]`."""
        width, hessian = self.grid.group_columns, self.objective.damped
        best_codes, best, best_error = codes, snapped, self._row_errors(values)
        for _ in range(self.options.refine_rounds):
            scales, offsets, curvature = refit_scales(
                self.weights, hessian, codes.T, snapped.scales(), snapped.offset_values(), width
            )
            codes, scales, curvature = flip_negative(codes, scales, curvature, width)
            snapped = snap_scales(scales, offsets, curvature, self.form, fixed_row_scale=self.row_scale)
            tables = self._tables(snapped)
            ranks, values = descend_codes(
                self.transposed, hessian, tables, width, ranks_of(tables, width, codes), self.options.descent_passes
            )
            codes = codes_of(tables, width, ranks)
            error = self._row_errors(values)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_codes = torch.where(better, codes, best_codes)
            best = snapped.where(better, best)
        return best_codes.T, best

    def _sweep_dynamic(self) -> tuple[Tensor, SnappedScales]:
        """Sweep that fits a group's scales from its compensated weights when it gets there (ShiftAddLLM, section 4.2)."""
        grid, bits = self.grid, self.options.bits
        scale = matrix_scale(self.weights)
        ratios = self.weights.new_zeros(grid.row_groups, grid.column_groups, bits)
        offsets = self.weights.new_zeros(grid.row_groups, grid.column_groups) if self.options.offset else None
        tables: dict[int, LevelTable] = {}

        def fit_on_arrival(group: int, current: Tensor) -> LevelTable:
            strip = ScaleGrid(grid.rows, current.shape[0], grid.group_rows, current.shape[0])
            columns = slice(group * grid.group_columns, group * grid.group_columns + current.shape[0])
            snapped = self._snap_fit(
                self._fit(current.T, strip, self.objective.damped.diagonal()[columns], rounding_scale=scale),
                strip,
                scale,
            )
            ratios[:, group] = snapped.ratios[:, 0]
            if offsets is not None and snapped.offsets is not None:
                offsets[:, group] = snapped.offsets[:, 0]
            tables[group] = self._tables(snapped)[0]
            return tables[group]

        ranks, _ = compensated_sweep(self.weights, self.objective, grid.group_columns, fit_on_arrival)
        codes = torch.empty_like(ranks)
        for group, table in tables.items():
            where = slice(group * grid.group_columns, (group + 1) * grid.group_columns)
            codes[where] = table.codes.gather(0, ranks[where].long())
        return codes.T, SnappedScales(ratios, offsets, scale)

    def _fit(
        self,
        weights: Tensor | None = None,
        grid: ScaleGrid | None = None,
        diagonal: Tensor | None = None,
        rounding_scale: Tensor | None = None,
    ) -> GroupFit:
        """Fit every block of a grid by itself. With `rounding_scale` the scales are rounded to the format in each round."""
        weights = self.weights if weights is None else weights
        grid = grid or self.grid
        diagonal = self.objective.damped.diagonal() if diagonal is None else diagonal
        # The paper's greedy fit minimises plain weight error; `search` weighs each input by its power.
        importance = torch.ones_like(diagonal) if self.options.fit == "greedy" else diagonal
        blocks = grid.blocks(weights)
        size = blocks.shape[-1]
        rounding = None
        if rounding_scale is not None:
            unit = rounding_scale

            def rounding(scales: Tensor) -> Tensor:
                return self.form.round(scales / unit) * unit

        return fit_groups(
            blocks.view(-1, size),
            grid.blocks(importance.expand_as(weights)).view(-1, size),
            self.options.bits,
            method=self.options.fit,
            rounds=self.options.fit_rounds,
            offset=self.options.offset,
            rounding=rounding,
        )

    def _snap_fit(
        self, fit: GroupFit, grid: ScaleGrid | None = None, fixed_row_scale: Tensor | None = None
    ) -> SnappedScales:
        """Put fitted scales on the format, each group weighed by its own normal matrix."""
        grid = grid or self.grid
        shape = (grid.row_groups, grid.column_groups)
        return snap_scales(
            fit.scales.view(*shape, -1),
            None if fit.offsets is None else fit.offsets.view(shape),
            fit.curvature.view(*shape, *fit.curvature.shape[1:]),
            self.form,
            fixed_row_scale=self.row_scale if fixed_row_scale is None else fixed_row_scale,
        )

    def _tables(self, snapped: SnappedScales) -> LevelTable:
        """Levels with batch shape `[C, out]`."""
        scales = self.grid.expand_rows(snapped.scales())
        offsets = snapped.offset_values()
        if offsets is not None:
            offsets = self.grid.expand_rows(offsets).T
        return LevelTable.build(scales.transpose(0, 1), offsets)

    def _row_errors(self, values: Tensor) -> Tensor:
        """Objective per row, `[out]`, of values `[in, out]`."""
        difference = self.transposed - values
        return ((self.objective.damped @ difference) * difference).sum(0)
