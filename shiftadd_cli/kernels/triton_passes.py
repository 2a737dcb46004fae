"""The passes before and after a product: they reorder the activations to match the words, and add up partial sums.

Spread activations: `[rows, LANES / JOINED, padded words, JOINED]`, where [m, t / JOINED, w, t % JOINED] is column
LANES · w + t of row m, and 0 beyond the last column. So the activations for bit t of neighbouring words are neighbours.
Codes are read as they are stored. The activations, which are thousands of times fewer, are reordered instead, and the
zeros save every kernel a mask.

Partial sums: float32 `[splits, rows, out · planes]`. They are added in the order of their index, never with atomics, so
that the same command gives the same bits. For the same reason, the number of splits depends only on shapes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SPREAD_BLOCK = 2048
_SUM_BLOCK = 256
_MOST_SPLITS = 16


def choose_splits(tiles: int, programs: int, target: int) -> tuple[int, int]:
    """The number of parts to split the `tiles` along the inputs into, so that `programs` times the parts is about
    `target`, and the number of tiles in a part (the last part may have fewer; no part is empty)."""
    splits = min(tiles, _MOST_SPLITS, triton.cdiv(target, programs))
    tiles_per_split = triton.cdiv(tiles, splits)
    return triton.cdiv(tiles, tiles_per_split), tiles_per_split


@triton.jit
def _spread_kernel(
    x, spread, columns, padded_words, x_stride, LANES: tl.constexpr, JOINED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    column = LANES * word + lane
    values = tl.load(x + row * x_stride + column, mask=column < columns, other=0.0)
    target = (lane // JOINED * padded_words + word) * JOINED + lane % JOINED
    pointer = spread + row * LANES * padded_words + target
    tl.store(pointer, values.to(spread.dtype.element_ty), mask=word < padded_words)


def spread_activations(x: Tensor, lanes: int, padded_words: int, joined: int, dtype: torch.dtype) -> Tensor:
    """`x` `[rows, in]`, last axis contiguous, as `[rows, lanes / joined, padded_words, joined]` in `dtype`."""
    rows, columns = x.shape
    spread = torch.empty(rows, lanes // joined, padded_words, joined, dtype=dtype, device=x.device)
    block = _SPREAD_BLOCK // lanes
    grid = (rows, triton.cdiv(padded_words, block))
    _spread_kernel[grid](x, spread, columns, padded_words, x.stride(0), LANES=lanes, JOINED=joined, BLOCK=block)
    return spread


@triton.jit
def _sum_kernel(
    partial, row_scale, bias, y, rows, outputs, splits,
    PLANES: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = output < outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        first = (split * rows + row).to(tl.int64) * outputs * PLANES
        for plane in tl.static_range(PLANES):
            total += tl.load(partial + first + output * PLANES + plane, mask=mask, other=0.0)
    if SCALED:
        total *= tl.load(row_scale + output, mask=mask, other=0.0)
    if BIASED:
        total += tl.load(bias + output, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * outputs + output, total.to(y.dtype.element_ty), mask=mask)


def sum_partials(
    partial: Tensor, planes: int, row_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The sum over splits and planes of float32 `[splits, rows, out · planes]`, times `row_scale` float32 `[out]`, plus
    `bias` `[out]` of any dtype: `[rows, out]` in `dtype`, rounded once."""
    splits, rows, width = partial.shape
    outputs = width // planes
    y = torch.empty(rows, outputs, dtype=dtype, device=partial.device)
    grid = (rows, triton.cdiv(outputs, _SUM_BLOCK))
    _sum_kernel[grid](
        partial, row_scale, bias, y, rows, outputs, splits,
        PLANES=planes, SCALED=row_scale is not None, BIASED=bias is not None, BLOCK=_SUM_BLOCK,
    )  # fmt: skip
    return y
