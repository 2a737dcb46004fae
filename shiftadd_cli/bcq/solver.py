"""Quantize the weights that read one input: from `[out, in]` matrices and a Hessian to their compressed form.

Rows of matrices with row-wise groups, and of shift layers, are independent, so all matrices that read the same input
are solved as one tall matrix. Stripes of trellis-coded planes are independent too. Column-wise and block forms share
scales across rows and are solved one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.bcq.hessian import Objective, build_objective, corrected_target, drift_target
from shiftadd_cli.bcq.levels import planes_of
from shiftadd_cli.bcq.options import SolverOptions
from shiftadd_cli.bcq.outliers import choose_outliers, corrections, outlier_count, without_columns, without_inputs
from shiftadd_cli.bcq.primitives import PRIMITIVES
from shiftadd_cli.bcq.primitives.base import Primitive
from shiftadd_cli.bcq.rotation import random_signs, rotate_moment, rotate_weight
from shiftadd_cli.bcq.snap import SnappedScales
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.distributed.team import ALONE, Team
from shiftadd_cli.errors import NumericalError

__all__ = ["Solution", "SolverOptions", "quantize_matrices"]

# Squares of larger weights, summed over a matrix and weighted by its inputs, can overflow float32.
_LARGEST_WEIGHT = 1e12
# Enough rows that an operation outweighs its call, few enough that a small matrix still yields a piece per core.
_PIECE_ROWS = 512
# The same where a piece consists of stripes, which threads divide among themselves.
_STRIPE_PIECE_ROWS = 2048


@dataclass(frozen=True)
class Solution:
    """A compressed matrix and its relative errors: ‖W − Ŵ‖² / ‖W‖², and the same in the form H (None without
    calibration)."""

    weight: QuantizedWeight
    weight_error: float
    output_error: float | None


def quantize_matrices(
    weights: Sequence[Tensor],
    names: Sequence[str],
    hessian: Tensor | None,
    options: SolverOptions,
    cross: Tensor | None = None,
    team: Team = ALONE,
    drift: Tensor | None = None,
) -> list[Solution]:
    """Quantize matrices `[out_i, in]` that read the same input, with second moment `hessian` `[in, in]` or None.

    `cross` `[in, in]` is E[x̃ xᵀ] with the input x̃ of the original model, for asymmetric calibration; `drift`
    `[out, in]`, for a single matrix, is that of `drift_target`. Computes in float32. The processes of a team divide the
    rows among themselves, and each returns all solutions.

    Raises NumericalError, naming the layer, for weights or inputs that are not finite and for Hessians that cannot be
    factorised.
    """
    matrices = [weight.float() for weight in weights]
    for matrix, name in zip(matrices, names, strict=True):
        if not torch.isfinite(matrix).all():
            raise NumericalError(f"The weight of {name} is not finite; the source checkpoint is damaged.")
        if matrix.abs().amax() > _LARGEST_WEIGHT:
            raise NumericalError(f"The weight of {name} contains values above 1e12; the source checkpoint is damaged.")
    columns = matrices[0].shape[1]
    primitive = PRIMITIVES[options.format.primitive]
    if hessian is not None and cross is not None and options.asymmetric:
        heights = [len(matrix) for matrix in matrices]
        tall = corrected_target(
            torch.cat(matrices), hessian.float(), cross.float(), options.weight_error, options.asymmetric, names[0]
        )
        matrices = list(tall.split(heights))
    if hessian is not None and drift is not None and options.drift:
        matrices = [drift_target(matrices[0], hessian.float(), drift.float(), options.drift, names[0])]
    split = _OutlierSplit(matrices, hessian, outlier_count(columns, options.format.outlier_columns))
    if split.ids is not None:
        matrices = [without_columns(matrix, split.ids) for matrix in matrices]
        hessian = None if hessian is None else without_inputs(hessian, split.ids)
    signs = None
    if options.format.rotation == "hadamard":
        # All following steps work in the rotated basis, which leaves every error unchanged.
        signs = random_signs(columns, options.seed).to(matrices[0].device)
        matrices = [rotate_weight(matrix, signs) for matrix in matrices]
        hessian = None if hessian is None else rotate_moment(hessian.float(), signs)
    if hessian is None:
        objective = _weight_objective(columns, matrices[0].device)
    else:
        width = primitive.scales(options.format, *matrices[0].shape).grid.group_columns
        objective = build_objective(
            hessian.float(),
            options.weight_error,
            names[0],
            order=options.sweep_order,
            group_columns=width,
            whole_groups=primitive.fits_on_arrival(options),
        )
    pieces, separate = _pieces(matrices, primitive, options)
    solved_pieces = team.map(lambda piece: _as_tensors(*primitive.solve(piece, objective, options)), pieces)
    solved = [_from_tensors(tensors, matrices[0].device) for tensors in solved_pieces]
    if separate:
        solved = _regroup(solved, [len(matrix) for matrix in matrices])
    packed = [_pack(codes, snapped, options, columns, signs) for codes, snapped in solved]
    if split.ids is not None:
        return split.completed(packed)
    return [
        # Errors are computed from the decoded stored tensors, not from the solver's own values.
        _solution(weight, matrix, matrix - weight.decode_stored(), hessian)
        for matrix, weight in zip(matrices, packed, strict=True)
    ]


def _pieces(matrices: Sequence[Tensor], primitive: Primitive, options: SolverOptions) -> tuple[Sequence[Tensor], bool]:
    """The rows of all matrices, in pieces to be solved separately, and whether a matrix may be several pieces."""
    together = primitive.rows_together(options.format)
    if together is None:
        return matrices, False
    if together == 1:
        tall = torch.cat(list(matrices))
        return tall.tensor_split(-(-len(tall) // _PIECE_ROWS)), True
    height = together * max(1, _STRIPE_PIECE_ROWS // together)
    return [piece for matrix in matrices for piece in matrix.split(height)], True


def _as_tensors(codes: Tensor, snapped: SnappedScales) -> dict[str, Tensor]:
    """The solution of a piece as tensors by name, for other processes."""
    tensors = {"codes": codes, "ratios": snapped.ratios, "row_scale": snapped.row_scale}
    return tensors if snapped.offsets is None else tensors | {"offsets": snapped.offsets}


def _from_tensors(tensors: dict[str, Tensor], device: torch.device) -> tuple[Tensor, SnappedScales]:
    local = {name: tensor.to(device) for name, tensor in tensors.items()}
    return local["codes"], SnappedScales(local["ratios"], local.get("offsets"), local["row_scale"])


def _regroup(
    solved: Sequence[tuple[Tensor, SnappedScales]], heights: Sequence[int]
) -> list[tuple[Tensor, SnappedScales]]:
    """Turn the solutions of consecutive pieces of rows into solutions of matrices of these heights."""
    codes = torch.cat([piece for piece, _ in solved]).split(list(heights))
    scales = SnappedScales.concatenate([snapped for _, snapped in solved]).split(heights)
    return list(zip(codes, scales, strict=True))


def _weight_objective(columns: int, device: torch.device) -> Objective:
    """The identity, since only the weight error counts without calibration."""
    identity = torch.eye(columns, device=device)
    return Objective(identity, torch.arange(columns, device=device), identity)


def _pack(
    codes: Tensor, snapped: SnappedScales, options: SolverOptions, columns: int, signs: Tensor | None
) -> QuantizedWeight:
    layout = PackedLayout(options.format, len(codes), columns)
    planes = planes_of(codes, layout.bits)
    return QuantizedWeight.pack(layout, planes, snapped.ratios, snapped.row_scale, snapped.offsets, signs)


class _OutlierSplit:
    """Matrices and the second moment of their input before outlier columns `ids` (None for `count` 0) are removed."""

    def __init__(self, matrices: Sequence[Tensor], hessian: Tensor | None, count: int) -> None:
        self.matrices, self.hessian = matrices, None if hessian is None else hessian.float()
        self.ids = choose_outliers(matrices, self.hessian, count) if count else None

    def completed(self, packed: Sequence[QuantizedWeight]) -> list[Solution]:
        """Solutions with the best outlier columns added to the planes `packed`."""
        assert self.ids is not None
        solutions = []
        for matrix, weight in zip(self.matrices, packed, strict=True):
            columns = corrections(matrix - weight.decode_planes(), self.hessian, self.ids)
            complete = weight.with_outliers(columns, self.ids)
            solutions.append(_solution(complete, matrix, matrix - complete.decode(), self.hessian))
        return solutions


def _solution(weight: QuantizedWeight, matrix: Tensor, difference: Tensor, hessian: Tensor | None) -> Solution:
    """The solution; `difference` is `matrix` minus the stored matrix, both in the basis of `hessian`."""
    weight_error = _ratio(difference.square().sum(), matrix.square().sum())
    if hessian is None:
        return Solution(weight, weight_error, None)
    form = hessian.float()
    output_error = _ratio(((difference @ form) * difference).sum(), ((matrix @ form) * matrix).sum())
    return Solution(weight, weight_error, output_error)


def _ratio(error: Tensor, reference: Tensor) -> float:
    return float(error / reference) if reference > 0 else 0.0
