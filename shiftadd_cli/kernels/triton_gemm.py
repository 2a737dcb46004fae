"""y = x W'ᵀ for many rows of activations: weights are decoded in registers and multiplied by the tensor cores.

Codes `[out · bits, words]` and scales as in `triton_decode`, activations spread as in `triton_passes`, in their own
dtype. A program keeps the codes and scales of BLOCK_OUT outputs and BLOCK_WORDS words in registers and decodes them
into one matrix `[BLOCK_OUT, 4 · BLOCK_WORDS]` after another: the weights of lanes 0 to 3 of all these words, of lanes 4
to 7, …. Each is multiplied by the activations of its lanes. A product does not depend on the order of its columns, and
this order lets every thread decode the words that it has loaded, each byte once.

Decoding in registers right before the product follows Marlin and GemLite, as does splitting the inputs when there are
too few outputs to fill a GPU (they use atomics; here `triton_passes` adds up partial sums). Weights are rounded to the
dtype of the activations, row scale included, as in the plain torch layer; sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shiftadd_cli.kernels.triton_decode import apply_sign, load_plane, load_scale
from shiftadd_cli.kernels.triton_passes import choose_splits, spread_activations, sum_partials
from shiftadd_cli.kernels.triton_weight import TritonWeight

_BLOCK_OUT = 64
_BLOCK_WORDS = 16
# Lanes that are decoded together and are neighbours in the activations; the kernel hard-codes this number.
_JOINED = 4
# Tensor cores need tiles of at least 16 rows; float32 does not use them (TF32 would drop 13 bits).
_LEAST_ROWS = 16
_MOST_ROWS = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}
# Enough programs to fill a large GPU; more for tiles of few rows, which need fewer registers and partial sums.
_PROGRAMS = 256
_PROGRAM_ROWS = 8192


def warps(block_rows: int) -> int:
    """Warps of a program: 8 if the sums of a tall tile would leave four warps too few registers for decoding."""
    return 8 if block_rows >= 64 else 4


@triton.jit
def _decode(scale, signs, offset, lane, PLANES: tl.constexpr):
    """Float32 weights of one lane, from tuples of the scales and words of PLANES planes."""
    weight = offset
    for plane in tl.static_range(PLANES):
        weight += apply_sign(scale[plane], signs[plane], lane)
    return weight


@triton.jit
def _gemm_kernel(
    codes, scales, offsets, row_scale, x, partial, rows, outputs, words, padded_words, scale_stride, groups,
    tiles_per_split,
    BITS: tl.constexpr, PLANES: tl.constexpr, TAPS: tl.constexpr, NIBBLES: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(2)
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output_mask, row_mask = output < outputs, row < rows
    scale_row = (output.to(tl.int64) * scale_stride)[:, None]
    own_scale = tl.load(row_scale + output, mask=output_mask, other=0.0)[:, None]
    x_row = x + (row.to(tl.int64) * LANES * padded_words)[None, :]
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, padded_words // BLOCK_WORDS)):
        word = tile * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        weight_mask = output_mask[:, None] & (word < words)[None, :]
        group = (word // GROUP)[None, :]
        signs, scale = (), ()
        for plane in tl.static_range(PLANES):
            plane_signs = load_plane(codes, output[:, None], plane, word[None, :], words, weight_mask, BITS, TAPS)
            signs += (plane_signs,)  # type: ignore[assignment]
            ratio = load_scale(scales, scale_row, group * PLANES + plane, weight_mask, NIBBLES)
            scale += (ratio * own_scale,)  # type: ignore[assignment]
        if OFFSET:
            offset = tl.load(offsets + output.to(tl.int64)[:, None] * groups + group, mask=weight_mask, other=0.0)
            offset = offset.to(tl.float32) * own_scale
        else:
            offset = tl.zeros((BLOCK_OUT, BLOCK_WORDS), tl.float32)
        for lane in range(0, LANES, 4):
            # The index of the last join is innermost, so lanes 0, 1, 2, 3 of a word end up next to each other.
            even = tl.join(_decode(scale, signs, offset, lane, PLANES), _decode(scale, signs, offset, lane + 2, PLANES))
            odd = tl.join(
                _decode(scale, signs, offset, lane + 1, PLANES), _decode(scale, signs, offset, lane + 3, PLANES)
            )
            weight = tl.reshape(tl.join(even, odd), (BLOCK_OUT, 4 * BLOCK_WORDS)).to(x.dtype.element_ty)
            column = lane * padded_words + tile * 4 * BLOCK_WORDS + tl.arange(0, 4 * BLOCK_WORDS)
            values = tl.load(x_row + column[:, None], mask=row_mask[None, :], other=0.0)
            total = tl.dot(weight, values, total, input_precision="ieee")
    target = partial + (split * rows + row).to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(target, total, mask=output_mask[:, None] & row_mask[None, :])


def gemm(x: Tensor, weight: TritonWeight, bias: Tensor | None = None) -> Tensor:
    """`x` `[rows, in]` (float32, float16 or bfloat16, last axis contiguous) times the transposed matrix, plus `bias`
    `[out]`: `[rows, out]` in the dtype of `x`. Weights are rounded to that dtype; sums are float32."""
    rows, outputs = x.shape[0], weight.row_scale.shape[0]
    block_rows = min(max(_LEAST_ROWS, triton.next_power_of_2(rows)), _MOST_ROWS[x.dtype])
    tiles = triton.cdiv(weight.words, _BLOCK_WORDS)
    grid = (triton.cdiv(outputs, _BLOCK_OUT), triton.cdiv(rows, block_rows))
    splits, tiles_per_split = choose_splits(tiles, grid[0] * grid[1], max(_PROGRAMS, _PROGRAM_ROWS // block_rows))
    spread = spread_activations(x, weight.lanes, tiles * _BLOCK_WORDS, _JOINED, x.dtype)
    partial = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    _gemm_kernel[(*grid, splits)](
        weight.codes, weight.scales, weight.offsets, weight.row_scale, spread, partial, rows, outputs, weight.words,
        tiles * _BLOCK_WORDS, weight.scales.stride(0), weight.groups, tiles_per_split,
        BITS=weight.bits, PLANES=weight.planes, TAPS=weight.taps, NIBBLES=weight.nibbles,
        GROUP=weight.group_words, LANES=weight.lanes, OFFSET=weight.offsets is not None,
        BLOCK_OUT=_BLOCK_OUT, BLOCK_ROWS=block_rows, BLOCK_WORDS=_BLOCK_WORDS, num_warps=warps(block_rows),
    )  # fmt: skip
    return sum_partials(partial, 1, None, bias, x.dtype)
