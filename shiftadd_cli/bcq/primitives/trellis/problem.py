"""Trellis-coded planes for one tall matrix under one quadratic form: from weights to stored bits and scales.

scale the code's own levels to each group  →  compensated sweep  →  repeat: refit all scales jointly, put them on the
format, coordinate descent on the paths  →  keep, per stripe, the solution with the smallest error

This is `planes.problem` with the best path of a column in place of the nearest level of a weight. Rows of a stripe
depend on each other, so a stripe keeps its best solution as a whole. Planes cannot be inverted to make a negative scale
positive; such a scale becomes zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.bcq.column_updates import compensated_sweep, descend_codes
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.levels import code_levels
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.primitives.planes.refit import refit_scales
from shiftadd_cli.bcq.primitives.trellis.codes import STRIPE_ROWS, FormatCode
from shiftadd_cli.bcq.primitives.trellis.paths import BestPaths
from shiftadd_cli.bcq.scale_formats import scale_format
from shiftadd_cli.bcq.snap import SnappedScales, matrix_scale, snap_scales


class TrellisProblem:
    """The problem of coding `weights` float32 `[out, in]` under `options` with the least error in `objective`.

    `weights` are whole stripes of a matrix; only the last stripe may have fewer rows.
    """

    def __init__(self, weights: Tensor, objective: Objective, options: SolverOptions, code: FormatCode) -> None:
        self.weights, self.objective, self.options = weights, objective, options
        self.code, self.starting = code.code, torch.tensor(code.scales, device=weights.device)
        stored = options.format
        self.offset, self.form = stored.offset, scale_format(stored.scale_format)
        self.grid = ScaleGrid.resolve(len(weights), weights.shape[1], stored.group_rows, stored.group_size)
        self.row_scale = None if stored.row_scale else matrix_scale(weights)
        self.transposed = weights.T.contiguous()
        self.row_groups = self.grid.expand_rows(torch.arange(self.grid.row_groups, device=weights.device))
        self.stripes = torch.arange(len(weights), device=weights.device) // STRIPE_ROWS

    def solve(self) -> tuple[Tensor, SnappedScales]:
        """Stored bits uint8 `[out, in]` and the scales."""
        snapped = self._starting_scales()
        paths, width = self._paths(snapped), self.grid.group_columns
        if self.options.sweep == "none":
            groups = torch.arange(len(self.transposed), device=self.weights.device) // width
            codes, values = paths.closest(self.transposed, groups)
        else:
            codes, values = compensated_sweep(self.weights, self.objective, width, paths)
        if self.options.refine_rounds:
            codes, snapped = self._refine(codes, snapped, values)
        return codes.T, snapped

    def _starting_scales(self) -> SnappedScales:
        """The code's scales times the root mean square of each group, where inputs count by their power."""
        blocks = self.grid.blocks(self.weights)
        importance = self.grid.blocks(self.objective.damped.diagonal().expand_as(self.weights))
        power = (blocks.square() * importance).sum(-1) / importance.sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        scales = power.sqrt().unsqueeze(-1) * self.starting
        terms = len(self.starting) + self.offset
        curvature = torch.eye(terms, device=scales.device).expand(*scales.shape[:2], terms, terms)
        offsets = torch.zeros_like(scales[..., 0]) if self.offset else None
        return snap_scales(scales, offsets, curvature, self.form, fixed_row_scale=self.row_scale)

    def _refine(self, codes: Tensor, snapped: SnappedScales, values: Tensor) -> tuple[Tensor, SnappedScales]:
        """Alternate joint refit and coordinate descent; each stripe keeps its best. codes, values: `[in, out]`."""
        width, hessian = self.grid.group_columns, self.objective.damped
        best_codes, best, best_error = codes, snapped, self._stripe_errors(values)
        for _ in range(self.options.refine_rounds):
            labels = self.code.selected(codes.T, STRIPE_ROWS).to(torch.uint8)
            scales, offsets, curvature = refit_scales(
                self.weights, hessian, labels, snapped.scales(), snapped.offset_values(), width
            )
            snapped = snap_scales(scales.clamp_min(0), offsets, curvature, self.form, fixed_row_scale=self.row_scale)
            paths = self._paths(snapped)
            codes, values = descend_codes(
                self.transposed, hessian, paths, width, self._values(paths, labels), self.options.descent_passes
            )
            error = self._stripe_errors(values)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            better_rows = better[self.stripes]
            best_codes = torch.where(better_rows, codes, best_codes)
            best = snapped.where(better_rows, best)
        return best_codes, best

    def _paths(self, snapped: SnappedScales) -> BestPaths:
        levels = code_levels(snapped.scales(), snapped.offset_values())
        return BestPaths(self.code, STRIPE_ROWS, levels[self.row_groups].transpose(0, 1).contiguous())

    def _values(self, paths: BestPaths, labels: Tensor) -> Tensor:
        """The values float32 `[in, out]` of labels uint8 `[out, in]`."""
        out = torch.empty_like(self.transposed)
        width = self.grid.group_columns
        for group, levels in enumerate(paths.levels):
            part = slice(group * width, (group + 1) * width)
            out[part] = levels.gather(1, labels[:, part].long()).T
        return out

    def _stripe_errors(self, values: Tensor) -> Tensor:
        """The objective per stripe, for values `[in, out]`."""
        difference = self.transposed - values
        errors = ((self.objective.damped @ difference) * difference).sum(0)
        return errors.new_zeros(int(self.stripes[-1]) + 1).index_add_(0, self.stripes, errors)
