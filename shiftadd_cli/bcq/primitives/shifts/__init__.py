"""Shift layers: every weight is a level from a fixed list, a power of two or a sum of two, times its row's scale.

    W[o, i] ≈ row_scale[o] · level[code[o, i]]

The lists are in `levels`. The only other stored tensor is `weight_row_scale`, bfloat16 `[out]`.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from shiftadd_cli.bcq.choices import Primitive as PrimitiveName
from shiftadd_cli.bcq.grid import Rows, ScaleGrid
from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.packing import unpack_codes
from shiftadd_cli.bcq.primitives.base import NO_SCALES, Counts, Primitive, RowDecoder, Scales, Tensors, TensorShapes
from shiftadd_cli.bcq.primitives.shifts.levels import shift_levels
from shiftadd_cli.bcq.primitives.shifts.problem import ShiftProblem
from shiftadd_cli.bcq.snap import SnappedScales


class ShiftLayers(Primitive):
    """Levels that are sums of `terms` powers of two."""

    format_version = 2
    plan_version = 2
    lookup_kernels = False

    def __init__(self, name: PrimitiveName, terms: int) -> None:
        self.name, self._terms = name, terms

    def scales(self, form: MatrixFormat, rows: int, columns: int) -> Scales:
        return Scales(ScaleGrid(rows, columns, 1, columns), NO_SCALES, row_scale=True, offset=False)

    def tensors(self, scales: Scales, bits: int) -> TensorShapes:
        return {"weight_row_scale": ((scales.grid.rows,), torch.bfloat16)}

    def rows_together(self, form: MatrixFormat) -> int:
        return self.stripe

    def fits_on_arrival(self, options: SolverOptions) -> bool:
        return False

    def solve(self, weights: Tensor, objective: Objective, options: SolverOptions) -> tuple[Tensor, SnappedScales]:
        return ShiftProblem(weights, objective, options).solve()

    def pack_scales(self, scales: Scales, ratios: Tensor, offsets: Tensor | None) -> dict[str, Tensor]:
        return {}

    def ratios(self, scales: Scales, bits: int, tensors: Tensors) -> None:
        return None

    def offsets(self, scales: Scales, tensors: Tensors, ratios: Tensor) -> None:
        return None

    def levels(self, bits: int, ratios: Tensor | None, offsets: Tensor | None) -> Tensor:
        return shift_levels(self.name, bits).view(1, 1, -1)

    def decoder(self, scales: Scales, bits: int, tensors: Tensors) -> RowDecoder:
        def decode(rows: Rows, out: Tensor) -> None:
            levels = shift_levels(self.name, bits).to(out.device)
            codes = unpack_codes(tensors["weight_codes"][rows], scales.grid.columns)
            out.copy_(levels.index_select(0, codes.flatten()).view_as(out))

        return decode

    def operations(self, scales: Scales, bits: int, *, tables: bool) -> Counts:
        """Every weight shifts its input once or twice and adds each result; there are no tables."""
        terms = self._terms * scales.grid.rows * scales.grid.columns
        counts: Counts = Counter()
        counts.update(shift=terms, fp32_add=terms)
        return counts

    def words(self, scales: Scales) -> tuple[str, ...]:
        return self.name, "row scales"
