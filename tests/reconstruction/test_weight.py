"""The tunable weight against the stored weight that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bcq_problems import random_hessian, random_weights
from formats import solver_options
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftadd_cli.bcq.primitives.shifts.levels import MAGNITUDES
from shiftadd_cli.bcq.rotation import rotate_weight
from shiftadd_cli.bcq.solver import quantize_matrices
from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.reconstruction.weight import TunableWeight

FORMATS = ("pot", "apot2", "apot3", "float")


def solved(rows: int = 6, columns: int = 40, **options: Any) -> tuple[torch.Tensor, QuantizedWeight]:
    weights = random_weights(rows, columns)
    options = {"bits": 2, "group_size": 16} | options
    (solution,) = quantize_matrices([weights], ["layer"], random_hessian(columns), solver_options(**options))
    return weights, solution.weight


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    bits=st.integers(1, 5),
    scale_format=st.sampled_from(FORMATS),
    offset=st.booleans(),
    row_scale=st.booleans(),
    rotation=st.sampled_from(["none", "hadamard"]),
    columns=st.sampled_from([5, 16, 24, 40]),
    outlier_columns=st.sampled_from([0.0, 0.1]),
)
def test_weight_starts_as_the_stored_one_bit_for_bit(**options: Any) -> None:
    weights, quantized = solved(**options)
    tunable = TunableWeight(quantized, weights)
    again = tunable.quantized()
    assert torch.equal(again.decode(), quantized.decode())
    torch.testing.assert_close(tunable(), quantized.decode(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("primitive", "bits"), sorted(MAGNITUDES))
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_shift_layers_match_their_stored_form_before_and_after_changes(
    primitive: str, bits: int, rotation: str
) -> None:
    weights, quantized = solved(primitive=primitive, bits=bits, rotation=rotation)
    tunable = TunableWeight(quantized, weights)
    assert torch.equal(tunable.quantized().decode(), quantized.decode())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tunable.parameters():
            parameter.add_(0.5 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    stored = tunable.quantized()
    assert not torch.equal(stored.tensors["weight_codes"], quantized.tensors["weight_codes"])
    torch.testing.assert_close(tunable(), stored.decode(), rtol=1e-4, atol=1e-5)
    tunable().square().sum().backward()
    assert all(parameter.grad is not None for parameter in tunable.parameters())


@pytest.mark.parametrize(("primitive", "bits"), [("trellis1", 1), ("trellis1", 2), ("trellis2", 3)])
@pytest.mark.parametrize("fields", [{}, {"offset": True, "group_size": "all"}, {"row_scale": False}], ids=str)
def test_paths_keep_their_codes_and_match_their_stored_form_before_and_after_changes(
    primitive: str, bits: int, fields: dict[str, Any]
) -> None:
    weights, quantized = solved(primitive=primitive, bits=bits, rows=300, **fields)
    tunable = TunableWeight(quantized, weights)
    assert torch.equal(tunable.quantized().decode(), quantized.decode())
    torch.testing.assert_close(tunable(), quantized.decode(), rtol=1e-5, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tunable.parameters():
            parameter.add_(0.2 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator))
    stored = tunable.quantized()
    assert torch.equal(stored.tensors["weight_codes"], quantized.tensors["weight_codes"])
    assert not torch.equal(stored.decode(), quantized.decode())
    torch.testing.assert_close(tunable(), stored.decode(), rtol=1e-4, atol=1e-5)
    tunable().square().sum().backward()
    assert all(parameter.grad is not None for parameter in tunable.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("outlier_columns", [0.0, 0.1])
def test_forward_matches_the_stored_form_after_changes(scale_format: str, offset: bool, outlier_columns: float) -> None:
    weights, quantized = solved(scale_format=scale_format, offset=offset, bits=3, outlier_columns=outlier_columns)
    tunable = TunableWeight(quantized, weights)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tunable.parameters():
            spread = parameter.abs().mean()
            parameter.add_(0.5 * spread * torch.randn(parameter.shape, generator=generator))
    stored = tunable.quantized()
    assert not torch.equal(stored.decode(), quantized.decode())
    torch.testing.assert_close(tunable(), stored.decode(), rtol=1e-4, atol=1e-5)
    declared = stored.layout.tensors()
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.tensors.items()} == declared


def test_outlier_columns_get_their_gradient_and_planes_fit_the_remainder() -> None:
    weights, quantized = solved(columns=32, outlier_columns=0.1)
    tunable = TunableWeight(quantized, weights)
    upstream = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    (tunable() * upstream).sum().backward()
    outliers, signs = quantized.outliers(), quantized.signs()
    assert outliers is not None
    assert signs is not None
    columns, ids = outliers
    assert tunable.columns is not None
    assert tunable.latent is not None
    torch.testing.assert_close(tunable.columns.grad, upstream[:, ids])
    remainder = weights.clone()
    remainder[:, ids] -= columns.float()
    distance = (rotate_weight(remainder, signs) - tunable.latent.detach()).norm()
    assert distance < (rotate_weight(weights, signs) - tunable.latent.detach()).norm()


def test_gradients_match_the_unrounded_formula() -> None:
    """With fixed codes, W = r · (Σ s·B + o): d/ds, d/do and d/dr by hand. Latent weights get the rotated gradient."""
    weights, quantized = solved(columns=32, offset=True, rotation="none")
    tunable = TunableWeight(quantized, weights)
    upstream = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    (tunable() * upstream).sum().backward()
    ratios, rows = quantized.ratios(), quantized.tensors["weight_row_scale"].float()
    signs = torch.stack([(quantized.tensors["weight_codes"][..., i // 8] >> (i % 8)) & 1 for i in range(32)], dim=-1)
    signs = signs.float() * 2 - 1
    by_group = (upstream * rows.unsqueeze(-1)).view(6, 1, 2, 16)
    expected = (by_group * signs.view(6, 2, 2, 16)).sum(-1).transpose(1, 2)
    assert tunable.ratios is not None
    torch.testing.assert_close(tunable.ratios.grad, expected, rtol=1e-4, atol=1e-5)
    assert tunable.offsets is not None
    torch.testing.assert_close(tunable.offsets.grad, by_group[:, 0].sum(-1), rtol=1e-4, atol=1e-5)
    inner = quantized.decode_stored() / rows.unsqueeze(-1)
    torch.testing.assert_close(tunable.row_scale.grad, (upstream * inner).sum(-1), rtol=1e-3, atol=1e-4)
    assert tunable.latent is not None
    assert tunable.latent.grad is not None
    assert torch.equal(tunable.latent.grad, upstream)
    assert ratios.shape == tunable.ratios.shape


def test_latent_weight_that_crosses_a_midpoint_changes_its_code() -> None:
    weights, quantized = solved(rotation="none")
    tunable = TunableWeight(quantized, weights)
    before = quantized.decode()
    assert tunable.latent is not None
    with torch.no_grad():
        tunable.latent[0, 0] += 100.0
    after = tunable.quantized().decode()
    assert after[0, 0] == before[0, :16].max().maximum(after[0, 0])
    assert after[0, 0] > before[0, 0] or before[0, 0] == before[0, :16].max()
    assert torch.equal(after[1:], before[1:])
    assert torch.equal(after[0, 1:], before[0, 1:])


def test_single_power_of_two_per_matrix_is_not_tuned() -> None:
    weights, quantized = solved(row_scale=False)
    tunable = TunableWeight(quantized, weights)
    tunable().sum().backward()
    assert tunable.row_scale.grad is None
