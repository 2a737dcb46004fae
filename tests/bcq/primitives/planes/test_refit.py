from __future__ import annotations

import pytest
import torch
from bcq_problems import generator, quadratic_error, quick, random_hessian, random_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.levels import code_signs
from shiftadd_cli.bcq.primitives.planes import refit
from shiftadd_cli.bcq.primitives.planes.refit import refit_scales


def problem(
    out: int, columns: int, width: int, bits: int, offset: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Weights, Hessian, codes, scales and offsets."""
    g = generator(seed)
    groups = -(-columns // width)
    codes = torch.randint(0, 2**bits, (out, columns), generator=g).to(torch.uint8)
    scales = 0.05 * torch.rand(out, groups, bits, generator=g)
    offsets = 0.02 * torch.randn(out, groups, generator=g) if offset else None
    hessian = random_hessian(columns, seed) + 0.01 * torch.eye(columns)
    return random_weights(out, columns, seed), hessian, codes, scales, offsets


def dense_basis(codes: Tensor, width: int, bits: int, offset: bool) -> Tensor:
    """One row of codes `[in]` as the matrix from (scales of group 1, offset of group 1, …) to weights, float64."""
    columns, terms = len(codes), bits + offset
    basis = torch.zeros(columns, -(-columns // width) * terms, dtype=torch.float64)
    for column, code in enumerate(codes.tolist()):
        first = column // width * terms
        for b in range(bits):
            basis[column, first + b] = 1.0 if code >> b & 1 else -1.0
        if offset:
            basis[column, first + bits] = 1.0
    return basis


def values(codes: Tensor, scales: Tensor, offsets: Tensor | None, width: int) -> Tensor:
    """Weights `[out, in]` that codes and scales stand for."""
    group = torch.arange(codes.shape[1]) // width
    result = (code_signs(scales.shape[-1])[codes.int()] * scales[:, group]).sum(-1)
    return result if offsets is None else result + offsets[:, group]


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(("columns", "width", "bits"), [(1, 1, 1), (24, 8, 3), (45, 16, 2), (30, 30, 4), (20, 3, 1)])
def test_refit_equals_dense_least_squares(columns: int, width: int, bits: int, offset: bool) -> None:
    weights, hessian, codes, scales, offsets = problem(5, columns, width, bits, offset)
    new_scales, new_offsets, curvature = refit_scales(weights, hessian, codes, scales, offsets, width)
    terms = bits + offset
    groups = -(-columns // width)
    form = hessian.double()
    present = scales if offsets is None else torch.cat((scales, offsets.unsqueeze(-1)), dim=-1)
    for row in range(5):
        basis = dense_basis(codes[row], width, bits, offset)
        normal = basis.T @ form @ basis
        ridge = 1e-4 * normal.diagonal().mean()
        rhs = basis.T @ form @ weights[row].double() + ridge * present[row].flatten().double()
        expected = torch.linalg.solve(normal + ridge * torch.eye(len(rhs)), rhs).view(groups, terms)
        torch.testing.assert_close(new_scales[row].double(), expected[:, :bits], rtol=1e-2, atol=1e-4)
        if offset:
            assert new_offsets is not None
            torch.testing.assert_close(new_offsets[row].double(), expected[:, bits], rtol=1e-2, atol=1e-4)
        for group in range(groups):
            part = slice(group * terms, (group + 1) * terms)
            torch.testing.assert_close(curvature[row, group].double(), normal[part, part], rtol=1e-4, atol=1e-4)


@quick
@given(
    out=st.integers(1, 6),
    columns=st.integers(1, 40),
    width=st.integers(1, 40),
    bits=st.integers(1, 5),
    offset=st.booleans(),
    seed=st.integers(0, 99),
)
def test_refit_never_raises_the_objective(
    out: int, columns: int, width: int, bits: int, offset: bool, seed: int
) -> None:
    width = min(width, columns)
    weights, hessian, codes, scales, offsets = problem(out, columns, width, bits, offset, seed)
    before = quadratic_error(weights - values(codes, scales, offsets, width), hessian)
    scales, offsets, _ = refit_scales(weights, hessian, codes, scales, offsets, width)
    after = quadratic_error(weights - values(codes, scales, offsets, width), hessian)
    assert (after <= before * (1 + 1e-4) + 1e-9).all()


def test_undetermined_scales_do_not_move_apart() -> None:
    # Two planes that are equal everywhere: only the sum of their scales matters.
    weights, hessian, _, scales, _ = problem(3, 16, 8, 2, False)
    codes = torch.where(weights > 0, 3, 0).to(torch.uint8)
    new_scales, _, _ = refit_scales(weights, hessian, codes, scales, None, 8)
    moved = new_scales - scales
    torch.testing.assert_close(moved[..., 0], moved[..., 1], rtol=1e-2, atol=1e-4)


def test_a_binary_coded_matrix_is_recovered() -> None:
    _, hessian, codes, scales, offsets = problem(4, 60, 20, 3, True)
    weights = values(codes, scales, offsets, 20)
    assert offsets is not None
    wrong = scales + 0.01 * torch.randn(scales.shape, generator=generator(3))
    refitted, refitted_offsets, _ = refit_scales(weights, hessian, codes, wrong, offsets * 0.5, 20)
    before = quadratic_error(weights - values(codes, wrong, offsets * 0.5, 20), hessian)
    after = quadratic_error(weights - values(codes, refitted, refitted_offsets, 20), hessian)
    assert (after < 1e-2 * before).all()


def test_pieces_of_rows_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(9, 40, 8, 3, True)
    weights, hessian, codes, scales, offsets = arguments
    full = refit_scales(weights, hessian, codes, scales, offsets, 8)
    monkeypatch.setattr(refit, "_PIECE_ELEMENTS", 2000)
    for one, other in zip(full, refit_scales(weights, hessian, codes, scales, offsets, 8), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
