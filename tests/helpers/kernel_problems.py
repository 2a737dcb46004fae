"""Compressed matrices for the tests of kernels, and their expected products."""

from __future__ import annotations

import torch
from artifacts import random_weight
from formats import layout_on
from torch import Tensor

from shiftadd_cli.bcq.choices import Primitive
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.packing import unpack_planes
from shiftadd_cli.bcq.weight import QuantizedWeight


def row_wise(
    rows: int,
    columns: int,
    group_size: int | str,
    bits: int,
    scale_format: str,
    *,
    offset: bool = False,
    row_scale: bool = True,
    seed: int = 0,
    primitive: Primitive = "bcq",
) -> QuantizedWeight:
    """A random matrix `[rows, columns]` with groups along its rows."""
    grid = ScaleGrid.resolve(rows, columns, 1, group_size)
    return random_weight(layout_on(grid, bits, scale_format, row_scale, offset, primitive=primitive), seed)


def decode_exactly(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The matrix of the planes in float64 `[out, in]`, and the sums of the absolute values of its terms."""
    layout, grid = weight.layout, weight.layout.grid
    ratios = weight.ratios()
    offsets = weight.offsets(ratios)
    planes = layout.primitive.packed_planes(weight.tensors["weight_codes"], slice(0, grid.rows), layout.bits)
    signs = unpack_planes(planes, grid.columns).double() * 2 - 1
    scales = grid.expand_columns(grid.expand_rows(ratios).double().mT)
    values, sizes = (signs * scales).sum(1), scales.abs().sum(1)
    if offsets is not None:
        wide = grid.expand_columns(grid.expand_rows(offsets).double())
        values, sizes = values + wide, sizes + wide.abs()
    row_scale = weight.tensors["weight_row_scale"].double().expand(grid.rows)[:, None]
    return values * row_scale, sizes * row_scale.abs()


def assert_product(y: Tensor, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None, *, rounded: bool) -> None:
    """Assert that `y` is `x` times the transposed matrix plus `bias`, up to float32 sums and one rounding to its dtype.
    rounded: the weights are rounded to that dtype too."""
    values, sizes = (tensor.to(x.device) for tensor in decode_exactly(weight))
    wide = x.double()
    exact = wide @ values.T
    size = wide.abs() @ sizes.T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    step = torch.finfo(y.dtype).eps
    allowed = 16 * torch.finfo(torch.float32).eps * size + step * exact.abs()
    if rounded and y.dtype != torch.float32:
        # The rounding of the weights; below the normal range of float16 it is absolute.
        allowed += step * (wide.abs() @ values.abs().T) + wide.abs().sum(-1, keepdim=True) * 2.0**-25
    error = (y.double() - exact).abs()
    assert y.shape == exact.shape
    assert (error <= allowed).all(), f"{(error / allowed).max().item():.3g} times the rounding error"
