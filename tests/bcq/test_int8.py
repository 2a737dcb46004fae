"""8-bit rows against the definition, one row at a time in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shiftadd_cli.bcq import int8
from shiftadd_cli.bcq.int8 import decode_table, encode_table, table_tensors
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.errors import NumericalError


def matrix(rows: int = 9, columns: int = 21, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * 10 ** torch.linspace(-4, 2, rows).unsqueeze(1)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 7), st.integers(1, 33), st.integers(0, 2**31))
def test_every_weight_is_within_half_a_step(rows: int, columns: int, seed: int) -> None:
    weight = matrix(rows, columns, seed)
    codes, scales = encode_table(weight, "x")
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    for row, code, scale in zip(weight.double(), codes.double(), scales.double(), strict=True):
        assert scale == (row.float().abs().max() / 127).bfloat16()
        assert code.abs().max() == 127
        # Half a step is enough at the ends too, where rounding the scale down to eight bits costs the most.
        assert ((row - scale * code).abs() <= scale / 2 * (1 + 1e-6)).all()


def test_codes_make_up_for_the_rounding_of_the_scale() -> None:
    weight = matrix(columns=4000)
    codes, scales = encode_table(weight, "x")
    exact = weight / (weight.abs().amax(1, keepdim=True) / 127)
    naive = decode_table(exact.round().to(torch.int8), scales)
    assert ((weight - decode_table(codes, scales)).norm(dim=1) < (weight - naive).norm(dim=1)).all()


def test_rows_of_zeros_and_of_tiny_values_stay_accurate() -> None:
    weight = torch.stack((torch.zeros(5), torch.full((5,), 1e-42), torch.full((5,), 1e-38), torch.ones(5)))
    codes, scales = encode_table(weight, "x")
    decoded = decode_table(codes, scales)
    assert torch.equal(decoded[0], weight[0])
    assert torch.isfinite(decoded).all()
    assert ((decoded - weight)[:3].abs() <= 1e-40).all()
    assert decoded[3].sub(1).abs().max() < 2**-8


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    weight = matrix()
    weight[7, 3] = value
    with pytest.raises(NumericalError, match=r"weight of model\.embed is not finite"):
        encode_table(weight, "model.embed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix().to(dtype)
    table = encode_table(weight, "x")
    monkeypatch.setattr(int8, "_TILE_WEIGHTS", 2 * 21)
    assert all(torch.equal(one, other) for one, other in zip(encode_table(weight, "x"), table, strict=True))


def test_kernels_of_a_convolution_are_rows_that_keep_their_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_TILE_WEIGHTS", 4 * 21)
    flat = matrix()[:, :18]
    kernels = flat.reshape(9, 2, 3, 3).clone()
    codes, scales = encode_table(kernels, "x")
    as_rows = encode_table(flat, "x")
    assert torch.equal(codes, as_rows[0].view(9, 2, 3, 3))
    assert torch.equal(scales, as_rows[1])
    assert torch.equal(decode_table(codes, scales), decode_table(*as_rows).view(9, 2, 3, 3))
    assert table_tensors(9, 2, 3, 3)["weight_int8"][0] == (9, 2, 3, 3)
    assert TableLayout((9, 2, 3, 3)).nbytes == TableLayout((9, 18)).nbytes


def test_sizes_are_those_of_the_tensors() -> None:
    codes, scales = encode_table(matrix(), "x")
    assert table_tensors(9, 21) == {
        "weight_int8": (tuple(codes.shape), codes.dtype),
        "weight_int8_scale": (tuple(scales.shape), scales.dtype),
    }
    assert TableLayout((9, 21)).nbytes == codes.nbytes + scales.nbytes == 9 * (21 + 2)
