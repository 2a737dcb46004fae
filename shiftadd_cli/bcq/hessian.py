"""The quadratic form that measures errors, H + λ · mean(diag H) · I, and its factors.

H = E[x xᵀ] for the input x of a linear layer measures output error; the identity measures weight error. Their sum is
the recipe's multi-objective form (design: both errors in one quadratic form).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shiftadd_cli.errors import NumericalError

# Even with λ = 0, the factorisation needs a diagonal well above rounding errors.
_LEAST_DAMPING = 1e-6
# λ of `drift_target`; measured, see docs/how-it-works.md.
_DRIFT_DAMPING = 0.3


@dataclass(frozen=True)
class Objective:
    """`damped` is H + λI, positive definite; `inverse_factor` is U, upper triangular, with (H + λI)⁻¹ = UᵀU.

    `order` int64 `[in]` is the sweep order; U has its columns in that order. Both matrices are float32 `[in, in]`.
    """

    damped: Tensor
    order: Tensor
    inverse_factor: Tensor


def damp(hessian: Tensor, weight_error: float, layer: str) -> Tensor:
    """H + λ · mean(diag H) · I; inputs that were always zero get only the weight-error term.

    Raises NumericalError, naming the layer, when the activations contain NaN or infinite values.
    """
    if not torch.isfinite(hessian).all():
        raise NumericalError(
            f"The calibration inputs of {layer} are not finite; use `dtype=float32` or other calibration text."
        )
    mean = hessian.diagonal().mean()
    scale = mean if mean > 0 else torch.ones_like(mean)
    damped = hessian.clone()
    damped.diagonal().add_(scale * max(weight_error, _LEAST_DAMPING))
    return damped


def corrected_target(
    weights: Tensor, hessian: Tensor, cross: Tensor, weight_error: float, strength: float, layer: str
) -> Tensor:
    """The weights that bring W x closest to the original W x̃: W + s · W (C − H) (H + λI)⁻¹, float32 `[out, in]`.

    `cross` is C = E[x̃ xᵀ], with x̃ the input in the original model and x the current one; λ is that of `damp`. For
    s = 1 the result minimises E‖W x̃ − V x‖² + λ‖W − V‖² over V, which compensates for the errors of earlier layers
    (GPTAQ, arXiv:2504.02692, section 3; Qronos, arXiv:2505.11695, section 3).
    """
    return weights + strength * _regress(weights @ (cross - hessian), hessian, weight_error, layer)


def drift_target(weights: Tensor, hessian: Tensor, drift: Tensor, strength: float, layer: str) -> Tensor:
    """The weights that bring the hidden states closest to the original's: W + s · D (H + λI)⁻¹, float32 `[out, in]`.

    `drift` is D = E[(h̃ − h) xᵀ], where h are the hidden states with W x added to them and h̃ those of the original. For
    s = 1 the result minimises E‖h̃ − h − (V − W) x‖² + λ‖W − V‖² over V. This is `corrected_target` with the errors that
    the hidden states have without this layer, which depend less on x. So λ is larger: most of what a small λ finds in
    calibration text is not there in other text.
    """
    return weights + strength * _regress(drift, hessian, _DRIFT_DAMPING, layer)


def _regress(moment: Tensor, hessian: Tensor, damping: float, layer: str) -> Tensor:
    """M (H + λ · mean(diag H) · I)⁻¹ for a moment M `[out, in]`."""
    natural = torch.arange(len(hessian), device=hessian.device)
    _, factor = factorise(damp(hessian, damping, layer), natural, layer)
    return moment @ factor.T @ factor


def column_order(diagonal: Tensor, group_columns: int, order: str, whole_groups: bool) -> Tensor:
    """The order of the compensated sweep: int64 `[in]`.

    `hessian`: descending diag H (the act-order of GPTQ), by whole groups of columns if the sweep fits the scales of
    each group on arrival; `natural`: left to right.
    """
    columns = len(diagonal)
    if order == "natural":
        return torch.arange(columns, device=diagonal.device)
    if not whole_groups:
        return torch.argsort(diagonal, descending=True, stable=True)
    padded = torch.nn.functional.pad(diagonal, (0, -columns % group_columns))
    groups = torch.argsort(padded.view(-1, group_columns).sum(-1), descending=True, stable=True)
    within = torch.arange(group_columns, device=diagonal.device)
    order_ = (groups.unsqueeze(-1) * group_columns + within).flatten()
    return order_[order_ < columns]


def factorise(damped: Tensor, order: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """Upper factor U of the inverse, (PHPᵀ)⁻¹ = UᵀU with P the permutation `order` (GPTQ, section 3.3).

    While the form is not numerically positive definite, the damping grows tenfold, up to the mean of its diagonal;
    beyond that, NumericalError names the layer. Returns the factorised form and U, both float32 `[in, in]`.
    """
    mean = damped.diagonal().mean()
    extra = 0.0
    while extra <= 1.0:
        form = damped.clone()
        form.diagonal().add_(mean * extra)
        # With J the reversal of rows and columns, J(PHPᵀ)J = LLᵀ gives U = JL⁻¹J. The inverse itself is never formed:
        # it loses twice as many digits.
        reverse = order.flip(0)
        lower, failed = torch.linalg.cholesky_ex(form[reverse][:, reverse])
        if not failed:
            identity = torch.eye(len(order), dtype=form.dtype, device=form.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if torch.isfinite(upper).all():
                return form, upper
        extra = 10 * extra if extra else _LEAST_DAMPING * 10
    raise NumericalError(f"The Hessian of {layer} cannot be factorised; use more `samples` or a larger `weight_error`.")


def build_objective(
    hessian: Tensor, weight_error: float, layer: str, *, order: str, group_columns: int, whole_groups: bool
) -> Objective:
    """Damp, order and factorise the Hessian of one input."""
    columns = column_order(hessian.diagonal(), group_columns, order, whole_groups)
    damped, factor = factorise(damp(hessian, weight_error, layer), columns, layer)
    return Objective(damped, columns, factor)
