"""Joint least squares for all scales and offsets of a row, in the full quadratic form.

For fixed planes, the error is quadratic in the row's scales x = (scales of group 1, offset of group 1, scales of group
2, …). Minimising (w − Bx)ᵀ H (w − Bx) gives BᵀHB x = BᵀHw. Rows are independent. This is the closed-form codebook step
of LNQ (GuidedQuant, section 4) for binary-coded levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.bcq.levels import code_signs

# Pulls scales that the planes leave undetermined (two equal planes in a group) towards their current values.
_RIDGE = 1e-4
# Rows are processed in pieces whose products with H, the largest temporaries, fit in the last-level cache.
_PIECE_ELEMENTS = 1 << 21


def refit_scales(
    weights: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    group_columns: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Solve again for the scales and offsets of every row.

    weights: float32 `[out, in]`; hessian: `[in, in]`; codes: uint8 `[out, in]`; scales: current values
    `[out, C, bits]`; offsets: `[out, C]` or None.

    Returns scales (a negative scale means that its plane must change sign), offsets, and the curvature of each group
    `[out, C, terms, terms]`.
    """
    out, columns = weights.shape
    groups, bits = scales.shape[1:]
    padding = groups * group_columns - columns
    hessian_padded = torch.nn.functional.pad(hessian, (0, padding, 0, padding))
    terms = bits + (offsets is not None)
    present = scales if offsets is None else torch.cat((scales, offsets.unsqueeze(-1)), dim=-1)
    piece = max(1, _PIECE_ELEMENTS // (groups * terms * max(groups * group_columns, groups * terms)))
    solved, curvatures = [], []
    for start in range(0, out, piece):
        where = slice(start, start + piece)
        basis = _basis(codes[where], bits, groups, group_columns, offsets is not None)
        pull = torch.nn.functional.pad(weights[where] @ hessian, (0, padding)).view(-1, groups, group_columns, 1)
        matrix = _normal_matrix(basis, hessian_padded, group_columns)
        rhs = (basis @ pull).reshape(len(basis), groups * terms)
        blocks = matrix.view(-1, groups, terms, groups, terms).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        # A copy, because the ridge is added to the matrix in place.
        curvatures.append(blocks.clone(memory_format=torch.contiguous_format))
        ridge = _RIDGE * matrix.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(1e-30)
        rhs += ridge * present[where].flatten(1)
        matrix.diagonal(dim1=1, dim2=2).add_(ridge)
        solved.append(torch.linalg.solve(matrix, rhs).view(-1, groups, terms))
    solution = torch.cat(solved)
    return (
        solution[..., :bits].contiguous(),
        None if offsets is None else solution[..., bits].contiguous(),
        torch.cat(curvatures),
    )


def _basis(codes: Tensor, bits: int, groups: int, group_columns: int, offset: bool) -> Tensor:
    """The signs of the planes, and ones for the offset: float32 `[rows, groups, terms, group_columns]`, zero-padded."""
    rows, columns = codes.shape
    signs = code_signs(bits).to(codes.device)[codes.int()].movedim(-1, 1)
    if offset:
        signs = torch.cat((signs, signs.new_ones(rows, 1, columns)), dim=1)
    padded = torch.nn.functional.pad(signs, (0, groups * group_columns - columns))
    return padded.view(rows, -1, groups, group_columns).transpose(1, 2).contiguous()


def _normal_matrix(basis: Tensor, hessian: Tensor, group_columns: int) -> Tensor:
    """BᵀHB of every row: `[rows, groups · terms, groups · terms]`."""
    rows, groups, terms, _ = basis.shape
    pushed = basis.new_empty(rows, groups * terms, groups * group_columns)
    matrix = basis.new_empty(rows, groups * terms, groups * terms)
    for group in range(groups):
        where, first = slice(group * terms, (group + 1) * terms), group * group_columns
        strip = hessian[first : first + group_columns, first:]
        pushed[:, where, first:] = (basis[:, group].reshape(rows * terms, -1) @ strip).view(rows, terms, -1)
    # The matrix is symmetric, so the products up to the diagonal determine it.
    for group in range(groups):
        where, stop = slice(group * terms, (group + 1) * terms), (group + 1) * terms
        columns = slice(group * group_columns, (group + 1) * group_columns)
        product = pushed[:, :stop, columns] @ basis[:, group].mT
        matrix[:, :stop, where] = product
        matrix[:, where, :stop] = product.mT
    return matrix
