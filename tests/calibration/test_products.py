"""Sums of products by every set of compiled kernels, and by torch, against float64."""

from __future__ import annotations

import pytest
import torch
from compiled import needs_kernels, on_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.calibration.products import add_products
from shiftadd_cli.native.extension import instruction_sets

WAYS = ["torch", *instruction_sets()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def activations(tokens: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random values; one column is a thousand times as large as the others, as in real models."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[:, columns // 2] *= 1000
    return x.to(dtype)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30)
@given(
    tokens=st.integers(1, 40) | st.integers(500, 1100),
    columns=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    crossed=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sums_equal_the_formula(
    way: str, tokens: int, columns: int, dtype: torch.dtype, crossed: bool, weighted: bool, seed: int
) -> None:
    x, other = activations(tokens, columns, dtype, seed), activations(tokens, columns, dtype, seed + 1)
    roots = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) if weighted else None
    before = torch.randn(2, columns, columns, generator=torch.Generator().manual_seed(seed))
    hessian, cross = before.clone()
    add_products(x, other if crossed else None, roots, hessian, cross if crossed else None, way)

    squares = torch.ones(tokens, 1).double() if roots is None else roots.double().square().unsqueeze(1)
    size = x.double().square().mean(0).sqrt()
    for left, total, start in ((x, hessian.triu(), before[0].triu()), (other, cross, before[1])):
        expected = start.double()
        if left is x or crossed:
            product = (squares * left.double()).T @ x.double()
            expected = expected + (product.triu() if left is x else product)
        bound = 1 + tokens * torch.outer(left.double().square().mean(0).sqrt(), size)
        assert ((total.double() - expected).abs() <= 1e-5 * bound).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, other = activations(700, 150, dtype, 1), activations(700, 150, dtype, 2)

    def sums_of_products() -> Tensor:
        sums = torch.zeros(2, 150, 150)
        add_products(x, other, None, sums[0], sums[1])
        return sums

    results = on_threads((1, 2, 5), sums_of_products)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("way", WAYS)
def test_columns_of_a_larger_tensor_are_accepted(way: str) -> None:
    tensor = activations(50, 40, torch.bfloat16, 3)
    part = tensor[:, ::2]
    assert not part.is_contiguous()
    sums = torch.zeros(20, 20)
    add_products(part, None, None, sums, None, way)
    expected = part.double().T @ part.double()
    assert ((sums.double() - expected).triu().abs() <= 1e-5 * expected.diagonal().max()).all()


@needs_kernels
def test_activations_of_two_dtypes_are_refused() -> None:
    x, hessian, cross = torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(3, 3)
    with pytest.raises(ValueError, match="different dtypes"):
        add_products(x, x.half(), None, hessian, cross, "portable")
