"""y = x W'ᵀ for few rows of activations: one bit of a plane at a time, only additions inside a group.

Codes `[out · bits, words]` and scales as in `triton_decode`, activations spread as in `triton_passes`, float32. A
program takes BLOCK_PLANES planes (those of one output are neighbours, so a matrix with more planes is just a taller
one), some of the words and one row of activations. For each plane it computes

    Σ_words scale[plane, g(word)] · Σ_lanes ±x[lane, word]        + offset[output, g(word)] · Σ_lanes x[lane, word]

with the second term only for the first plane of an output. `triton_passes` sums the results over words and planes.

Decoding bit planes in registers follows the k-bit GEMV of bitsandbytes. Splitting the inputs follows GemLite's
RevSplitK, but without atomics. Tile sizes are fixed and not tuned at run time, because another tile size would add in
another order, and the same command must give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shiftadd_cli.kernels.triton_decode import apply_sign, load_plane, load_scale
from shiftadd_cli.kernels.triton_passes import choose_splits, spread_activations, sum_partials
from shiftadd_cli.kernels.triton_weight import TritonWeight

# Words of a tile, from wide to narrow: fewer than a program has threads. Only then does the compiler let every thread
# load the activations that it needs; otherwise they pass through shared memory, with barriers for each lane.
_BLOCKS_OF_WORDS = (64, 32)
# Elements of a tile, eight per thread.
_BLOCK = 1024
_WARPS = 4
# Enough programs of this size to fill a large GPU.
_PROGRAMS = 1024


@triton.jit
def _gemv_kernel(
    codes, scales, offsets, x, partial, rows, planes, words, padded_words, scale_stride, groups, tiles_per_split,
    BITS: tl.constexpr, PLANES: tl.constexpr, TAPS: tl.constexpr, NIBBLES: tl.constexpr, GROUP: tl.constexpr,
    LANES: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK_PLANES: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    # Rows of activations that use the same codes run at the same time, so that only the first misses the cache.
    row, split = tl.program_id(0) % rows, tl.program_id(1)
    plane = tl.program_id(0) // rows * BLOCK_PLANES + tl.arange(0, BLOCK_PLANES)
    plane_mask = plane < planes
    output, number = plane // PLANES, plane % PLANES
    scale_row = (output.to(tl.int64) * scale_stride)[:, None]
    x_row = x + row.to(tl.int64) * LANES * padded_words
    total = tl.zeros((BLOCK_PLANES, BLOCK_WORDS), tl.float32)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, padded_words // BLOCK_WORDS)):
        word = tile * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        code_mask = plane_mask[:, None] & (word < words)[None, :]
        signs = load_plane(codes, output[:, None], number[:, None], word[None, :], words, code_mask, BITS, TAPS)
        group = (word // GROUP)[None, :]
        scale = load_scale(scales, scale_row, group * PLANES + number[:, None], code_mask, NIBBLES)
        dot = tl.zeros((BLOCK_PLANES, BLOCK_WORDS), tl.float32)
        plain = tl.zeros((BLOCK_WORDS,), tl.float32)
        x_lane = x_row + word
        # Eight lanes at a time, because 32 at once would fill the registers with activations.
        for _ in range(LANES // 8):
            for lane in tl.static_range(8):
                value = tl.load(x_lane)
                dot += apply_sign(value[None, :], signs, lane)
                if OFFSET:
                    plain += value
                x_lane += padded_words
            signs = signs >> 8
        total += scale * dot
        if OFFSET:
            offset_mask = code_mask & (number == 0)[:, None]
            offset = tl.load(offsets + output.to(tl.int64)[:, None] * groups + group, mask=offset_mask, other=0.0)
            total += offset.to(tl.float32) * plain[None, :]
    target = partial + (split * rows + row).to(tl.int64) * planes + plane
    tl.store(target, tl.sum(total, 1), mask=plane_mask)


def gemv(x: Tensor, weight: TritonWeight, bias: Tensor | None = None) -> Tensor:
    """`x` `[rows, in]` (float32, float16 or bfloat16, last axis contiguous) times the transposed matrix, plus `bias`
    `[out]`: `[rows, out]` in the dtype of `x`. Everything is float32 until the result is rounded. The work grows with
    the number of rows; beyond a few rows `gemm` is faster."""
    rows, planes = x.shape[0], weight.row_scale.shape[0] * weight.planes
    # The wider block, unless more than an eighth of the work would be padding.
    block_words = next((block for block in _BLOCKS_OF_WORDS if -weight.words % block <= weight.words // 8), 32)
    block_planes = _BLOCK // block_words
    tiles = triton.cdiv(weight.words, block_words)
    blocks = triton.cdiv(planes, block_planes)
    # Independent of the number of rows, so that the result for a row does not depend on the other rows.
    splits, tiles_per_split = choose_splits(tiles, blocks, _PROGRAMS)
    spread = spread_activations(x, weight.lanes, tiles * block_words, 1, torch.float32)
    partial = torch.empty(splits, rows, planes, dtype=torch.float32, device=x.device)
    _gemv_kernel[(rows * blocks, splits)](
        weight.codes, weight.scales, weight.offsets, spread, partial, rows, planes, weight.words, tiles * block_words,
        weight.scales.stride(0), weight.groups, tiles_per_split,
        BITS=weight.bits, PLANES=weight.planes, TAPS=weight.taps, NIBBLES=weight.nibbles,
        GROUP=weight.group_words, LANES=weight.lanes, OFFSET=weight.offsets is not None,
        BLOCK_PLANES=block_planes, BLOCK_WORDS=block_words, num_warps=_WARPS,
    )  # fmt: skip
    return sum_partials(partial, weight.planes, weight.row_scale, bias, x.dtype)
