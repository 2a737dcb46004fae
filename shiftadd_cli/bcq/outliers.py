"""Outlier columns: input columns kept at 16 bits in addition to the planes, W x ≈ Ŵ x + C x_K.

K holds the columns that contribute most to the output, ‖W_k‖² E[x_k²] (as in OWQ, arXiv:2306.02272, section 3, but
without its measure of the error from quantizing them). The planes need not represent them well: they are solved with
these inputs left out. C then corrects the error of the planes in K and, as far as other inputs correlate with those in
K, elsewhere:

    C = argmin E‖(W − Ŵ − C E_K) x‖² = (W − Ŵ) H[:, K] H[K, K]⁻¹

K is the same for all matrices that read one input. It indexes the unrotated input, even if the planes are rotated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Relative to the mean diagonal of H[K, K]: inputs of a group may be copies of each other.
_DAMPING = 1e-6


def outlier_count(columns: int, share: float) -> int:
    """The number of columns in a share of all columns; at least one unless the share is 0."""
    return min(columns, max(1, round(share * columns))) if share > 0 else 0


def are_columns(ids: Tensor, columns: int) -> bool:
    """Whether `ids` are valid column indices, strictly ascending, for a matrix with this many columns."""
    return bool((ids >= 0).all() and (ids < columns).all() and (ids.diff() > 0).all())


def choose_outliers(matrices: Sequence[Tensor], hessian: Tensor | None, count: int) -> Tensor:
    """The columns K for matrices `[out_i, in]` that read one input with second moment `hessian` `[in, in]` (None: equal
    power in all columns): int64 `[count]`, ascending."""
    power: Tensor = sum((matrix.square().sum(0) for matrix in matrices), torch.zeros(()))
    if hessian is not None:
        power = power * hessian.diagonal()
    return power.topk(count).indices.sort().values


def without_columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """A copy of `matrix` `[rows, in]` with zeros in `columns`."""
    return matrix.index_fill(1, columns, 0.0)


def without_inputs(hessian: Tensor, columns: Tensor) -> Tensor:
    """The second moment `[in, in]` of the input with the entries in `columns` set to zero."""
    return hessian.index_fill(0, columns, 0.0).index_fill(1, columns, 0.0)


def corrections(difference: Tensor, hessian: Tensor | None, columns: Tensor) -> Tensor:
    """C `[out, K]` for the error `difference` `[out, in]` of the planes."""
    if hessian is None:
        return difference[:, columns]
    form = hessian[columns][:, columns].double()
    form.diagonal().add_(_DAMPING * form.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    right = (difference @ hessian[:, columns]).double()
    return torch.linalg.solve(form, right, left=False).float()
