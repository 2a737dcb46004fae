"""Signed block-Hadamard rotation of a linear layer's input: it spreads outliers over many columns before coding.

With D a diagonal matrix of random signs and H the Hadamard matrix of order n (the largest power of two that divides the
width), applied to every n columns,

    R = 2⁻ᵏ H D,   k = ⌊log₂ n / 2⌋,        W x = (W R⁻¹)(R x)

R x costs additions and a scaling by a power of two. 2ᵏ is √n, or √n / √2 where n is an odd power of two, so that
numbers keep their magnitude in half precision. R⁻¹ = D H 2ᵏ / n is just as simple, so undoing the rotation is exact.
The incoherence argument is that of QuIP (arXiv:2307.13304, section 3.2) with the Hadamard transform of QuIP#
(arXiv:2402.04396, section 3).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Sylvester matrices are applied as small dense factors: on a CPU one product with a 64 × 64 matrix is faster than six
# passes of additions in plain torch.
_LARGEST_FACTOR = 64


def rotation_block(columns: int) -> int:
    """The order n of the Hadamard matrix for a width: its largest power-of-two divisor (1 for odd widths)."""
    return columns & -columns


def random_signs(columns: int, seed: int) -> Tensor:
    """The diagonal of D: float32 `[columns]` of ±1, on the CPU. Linear layers of one width share it."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(0, 2, (columns,), generator=generator, device="cpu").float() * 2 - 1


def rotate_input(x: Tensor, signs: Tensor) -> Tensor:
    """R x for `x` `[..., in]`, computed in float32 or wider; `signs` ±1 `[in]`. The result has the dtype of `x`."""
    wide = x if x.dtype == torch.float64 else x.float()
    return _transform(wide * signs).to(x.dtype)


def rotate_weight(weight: Tensor, signs: Tensor) -> Tensor:
    """W R⁻¹, the matrix that multiplies rotated inputs: float `[out, in]`."""
    return _transform(weight * signs) * _inverse_scale(len(signs))


def restore_weight(rotated: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotate_weight`: (W R⁻¹) R."""
    return _transform(rotated) * signs


def rotate_moment(moment: Tensor, signs: Tensor) -> Tensor:
    """E[(R x)(R y)ᵀ] from E[x yᵀ], `[in, in]`."""
    return rotate_input(rotate_input(moment, signs).T.contiguous(), signs).T.contiguous()


def _inverse_scale(columns: int) -> float:
    """The ratio of R⁻¹ to Rᵀ, 2²ᵏ / n: 1 or 1/2."""
    return 1.0 if rotation_block(columns).bit_length() % 2 else 0.5


def _transform(x: Tensor) -> Tensor:
    """Apply 2⁻ᵏ H to every n entries of the last axis."""
    n = rotation_block(x.shape[-1])
    # H of order a · b is the Kronecker product of the matrices of orders a and b.
    shape, remaining = x.shape, n
    x = x.reshape(-1, n)
    while remaining > 1:
        factor = min(remaining, _LARGEST_FACTOR)
        remaining //= factor
        # The current factor acts on the middle axis; the inner axis holds the factors already applied.
        inner = n // (remaining * factor)
        if inner == 1:
            x = x.view(-1, factor) @ _hadamard(factor).to(x)
        else:
            x = _hadamard(factor).to(x) @ x.view(-1, factor, inner)
    exponent = (n.bit_length() - 1) // 2
    return x.reshape(shape) * 2.0**-exponent


@cache
def _hadamard(order: int) -> Tensor:
    """Sylvester's Hadamard matrix of a power-of-two order, float32 of ±1."""
    matrix = torch.ones(1, 1, device="cpu")
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix
