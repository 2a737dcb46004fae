"""Trellis-coded planes: the signs of more planes than are stored.

    W[o, i] ≈ row_scale[o] · (Σ_b scale[o, g(i), b] · B_b[o, i]  +  offset[o, g(i)])        b = 1 … m

A weight stores k bits, and each of its m = k + 1 or k + 2 planes is the parity of some stored bits of the weight itself
and of the rows above it in the same column (`code`). Among all paths through the stored bits, the encoder picks the
one with the least error, so k bits buy most of the precision of m planes (trellis-coded quantization, Marcellin and
Fischer 1990; for weights of language models QTIP, arXiv:2406.11235). Tensors, scale formats and products are those of
binary planes with m scales in each set.

Rows are divided into stripes of 256, and the register starts with zeros in each, so that stripes decode on their own.
"""

from __future__ import annotations

from torch import Tensor

from shiftadd_cli.bcq.choices import Primitive as PrimitiveName
from shiftadd_cli.bcq.grid import Rows
from shiftadd_cli.bcq.hessian import Objective
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.primitives.base import Counts, Scales
from shiftadd_cli.bcq.primitives.planes import BinaryPlanes
from shiftadd_cli.bcq.primitives.trellis.code import TrellisCode
from shiftadd_cli.bcq.primitives.trellis.codes import CODES, STRIPE_ROWS
from shiftadd_cli.bcq.primitives.trellis.problem import TrellisProblem
from shiftadd_cli.bcq.snap import SnappedScales


class TrellisPlanes(BinaryPlanes):
    """Planes that are computed from fewer stored bits, `extra` more than there are bits."""

    name: PrimitiveName
    format_version = 4
    plan_version = 3
    stripe = STRIPE_ROWS

    def __init__(self, name: PrimitiveName, extra: int) -> None:
        self.name, self._extra = name, extra

    def planes(self, bits: int) -> int:
        return bits + self._extra

    def code(self, bits: int) -> TrellisCode:
        """The code for `bits` stored bits."""
        return CODES[bits, self.planes(bits)].code

    def fits_on_arrival(self, options: SolverOptions) -> bool:
        return False

    def solve(self, weights: Tensor, objective: Objective, options: SolverOptions) -> tuple[Tensor, SnappedScales]:
        form = options.format
        return TrellisProblem(weights, objective, options, CODES[form.bits, self.planes(form.bits)]).solve()

    def packed_planes(self, codes: Tensor, rows: Rows, bits: int) -> Tensor:
        return self.code(bits).packed_planes(codes, rows, STRIPE_ROWS)

    def operations(self, scales: Scales, bits: int, *, tables: bool) -> Counts:
        """Those of its planes, and the exclusive-ors of words of 16 columns that compute them."""
        counts = super().operations(scales, bits, tables=tables)
        code, words = self.code(bits), -(-scales.grid.columns // 16)
        counts.update(xor_16_bits=scales.grid.rows * words * (code.taps - code.planes))
        return counts

    def words(self, scales: Scales) -> tuple[str, ...]:
        return (self.name, *super().words(scales))
