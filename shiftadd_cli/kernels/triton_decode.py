"""Device functions that decode the stored tensors into numbers, in registers.

Data (see `bcq.weight`): the codes of a matrix `[out, in]` are read as `[out · bits, words]`, where row o · bits + b is
plane b of output o, in words of LANES = 8 (uint8) or 32 (int32) columns. Machines are little-endian, so in both cases
bit t of word w is the sign of column LANES · w + t. Scales keep their stored form: field g · planes + b of output o,
in rows of `scale_stride` bytes of nibbles or of `scale_stride` float16 numbers.

Trellis-coded planes are computed from the stored ones, all columns of a word at once (see `bcq.primitives.trellis`).
Tap t of the register of output o is stored plane t % bits of output o - t // bits, or zeros if that output belongs to
the stripe above. A plane is the exclusive-or of its taps: plane b has tap t if bit 6 · t + b of `TAPS` is set.

No number comes from a table: a sign moves from its bit into the sign bit of a float, and a power of two is assembled
from its exponent. This is the "shift and add" of ShiftAddLLM (arXiv:2406.05981, section 4.1) for float32. The only
remaining multiplication, by the scale, is exact for `pot`, as the mantissa of the scale is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shiftadd_cli.bcq.primitives.trellis.codes import MEMORY, STRIPE_ROWS

# Kernels may read only globals that are constexpr.
_SIGN = tl.constexpr(0x80000000)
# The float32 format.
_EXPONENT_BIAS = tl.constexpr(127)
_MANTISSA_BITS = tl.constexpr(23)
_ZERO_EXPONENT = tl.constexpr(15)
_MEMORY = tl.constexpr(MEMORY)
_STRIPE = tl.constexpr(STRIPE_ROWS)


@triton.jit
def load_plane(codes, output, plane, word, words, mask, BITS: tl.constexpr, TAPS: tl.constexpr):
    """Words of plane `plane` of outputs `output` (both int32) as uint32, inverted: bit t is set if the sign of lane t
    is minus. Masked words are undefined."""
    first = codes + output.to(tl.int64) * BITS * words + word
    if TAPS == 0:
        bits = tl.load(first + plane * words, mask=mask, other=0).to(tl.int32)
    else:
        bits = 0
        for tap in tl.static_range(_MEMORY + BITS):
            # If `plane` is a constant, the compiler drops the loads of the taps that it does not have.
            has_tap = ((((TAPS >> (6 * tap)) & 63) >> plane) & 1) != 0
            tap_mask = mask & has_tap & (output % _STRIPE >= tap // BITS)
            bits ^= tl.load(first + (tap % BITS - tap // BITS * BITS) * words, mask=tap_mask, other=0).to(tl.int32)
    return (~bits).to(tl.uint32, bitcast=True)


@triton.jit
def apply_sign(values, words, lane):
    """Float32 `values`, negated where bit `lane` of `words` (from `load_plane`) is set."""
    sign = (words << (31 - lane)) & _SIGN
    return (values.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32, for int32 exponents −126 … 127."""
    return ((exponent + _EXPONENT_BIAS) << _MANTISSA_BITS).to(tl.float32, bitcast=True)


@triton.jit
def decode_scale(code, NIBBLES: tl.constexpr):
    """The float32 ratio of an int32 code of 1, 2 or 3 nibbles; see `bcq.scale_formats`."""
    exponent = code & 15
    power = -exponent
    ratio = power_of_two(power)
    for k in tl.static_range(1, NIBBLES):
        term = code >> (4 * k)
        distance = term & 7
        power -= distance
        summand = power_of_two(power)
        summand = tl.where((term & 8) != 0, -summand, summand)
        ratio += tl.where(distance != 0, summand, 0.0)
    return tl.where(exponent == _ZERO_EXPONENT, 0.0, ratio)


@triton.jit
def load_scale(scales, row_start, field, mask, NIBBLES: tl.constexpr):
    """Float32 scales of the fields `field` (int32) in the rows that begin at `row_start` (int64, in elements).

    `scales` points to uint8 nibbles, or to float16 numbers for NIBBLES = 0. Masked scales are 0.
    """
    if NIBBLES == 0:
        return tl.load(scales + row_start + field, mask=mask, other=0.0).to(tl.float32)
    # A code of three nibbles begins in the high half of a byte if its index is odd.
    first = row_start + (field * NIBBLES >> 1)
    code = tl.load(scales + first, mask=mask, other=255).to(tl.int32)
    if NIBBLES == 3:
        code |= tl.load(scales + first + 1, mask=mask, other=255).to(tl.int32) << 8
    if NIBBLES != 2:
        code = code >> ((field & 1) << 2)
    return decode_scale(code, NIBBLES)
