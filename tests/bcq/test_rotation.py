"""The rotation against a dense matrix in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq.rotation import (
    random_signs,
    restore_weight,
    rotate_input,
    rotate_moment,
    rotate_weight,
    rotation_block,
)

# Odd, even and odd powers of two, blocks side by side, blocks of more than one factor.
WIDTHS = (1, 2, 7, 8, 24, 40, 64, 96, 128, 192, 256, 576, 1536, 4096, 8192)


def dense_rotation(signs: Tensor) -> Tensor:
    """R, float64 `[in, in]`, entry by entry: H[i, j] = (−1)^(number of ones in i and j)."""
    columns = len(signs)
    n = 1
    while columns % (2 * n) == 0:
        n *= 2
    index = torch.arange(n)
    common = index.unsqueeze(1) & index
    ones = sum((common >> bit) & 1 for bit in range(n.bit_length()))
    hadamard = 1.0 - 2.0 * (torch.as_tensor(ones) % 2).double()
    scale = 1.0
    while scale * 4 <= n:
        scale *= 4
    return torch.block_diag(*[hadamard / scale**0.5] * (columns // n)) * signs.double()


@pytest.mark.parametrize("columns", WIDTHS[:-2])
def test_rotation_equals_the_dense_matrix(columns: int) -> None:
    signs = random_signs(columns, seed=3)
    dense = dense_rotation(signs)
    x = torch.randn(3, 2, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rotate_input(x, signs), x @ dense.T)
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(rotate_weight(weight, signs), weight @ torch.linalg.inv(dense))
    moment = x.view(-1, columns).T @ x.view(-1, columns)
    torch.testing.assert_close(rotate_moment(moment, signs), dense @ moment @ dense.T)


@pytest.mark.parametrize("columns", WIDTHS)
def test_products_and_restored_weights_lose_only_rounding(columns: int) -> None:
    signs = random_signs(columns, seed=0)
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(4, columns, generator=generator), torch.randn(6, columns, generator=generator)
    rotated = rotate_weight(weight, signs)
    torch.testing.assert_close(restore_weight(rotated, signs), weight, rtol=0, atol=2e-6)
    product = rotate_input(x, signs).double() @ rotated.double().T
    torch.testing.assert_close(product, x.double() @ weight.double().T, rtol=0, atol=1e-5 * columns**0.5)


@given(st.integers(1, 600), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_length_is_kept_up_to_a_factor_of_two_in_power(columns: int, seed: int) -> None:
    signs = random_signs(columns, seed)
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    x = torch.randn(columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gain = float(rotate_input(x, signs).square().sum() / x.square().sum())
    odd_power = (rotation_block(columns).bit_length() - 1) % 2
    assert gain == pytest.approx(2.0 if odd_power else 1.0)


def test_integers_are_restored_exactly() -> None:
    """There are only additions and powers of two, so integers are not rounded."""
    signs = random_signs(96, seed=5)
    x = torch.randint(-100, 100, (4, 96), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(restore_weight(rotate_weight(x, signs), signs), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rotation_keeps_the_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    signs = random_signs(64, seed=0)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    rotated = rotate_input(x, signs)
    assert rotated.dtype == dtype
    exact = x.double() @ dense_rotation(signs).T
    error = (rotated.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 64 * torch.finfo(torch.float32).eps).all()


def test_signs_depend_only_on_the_seed() -> None:
    torch.manual_seed(1)
    first = random_signs(1000, seed=7)
    torch.manual_seed(2)
    assert torch.equal(first, random_signs(1000, seed=7))
    assert not torch.equal(first, random_signs(1000, seed=8))
    assert abs(float(first.mean())) < 0.15
