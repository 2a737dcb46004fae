"""Sums of products of activations over tokens. They use the compiled kernels, which read bfloat16 directly, where
these are faster than torch. `scripts/benchmark_solver.py` times both."""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.native.extension import TYPES, cpu_extension, instruction_sets

# The kernel sets that are faster than torch; on other processors torch is faster.
_FASTER = ("amx", "avx512_bf16", "avx512", "avx2")
# Columns of a second moment that torch updates at once.
_STRIP = 256


def add_products(
    x: Tensor, other: Tensor | None, roots: Tensor | None, hessian: Tensor, cross: Tensor | None, kernels: str = ""
) -> None:
    """hessian += Σ w x xᵀ on and above the diagonal, and cross += Σ w x̃ xᵀ, in place; w: the squares of `roots`.

    x: `[tokens, columns]` of any float dtype; other: x̃, with x's shape and dtype, or None if there is no cross.
    roots: float32 `[tokens]`, not negative, or None for ones. hessian, cross: float32 `[columns, columns]`, contiguous;
    `hessian` is undefined below the diagonal. Products and sums are in float32. kernels: an instruction set, "" for the
    fastest available, or "torch".
    """
    extension = cpu_extension()
    kernels = kernels or next((name for name in instruction_sets() if name in _FASTER), "torch")
    if kernels == "torch" or extension is None or not x.is_cpu:
        _add_by_torch(x, other, roots, hessian, cross)
        return
    if other is not None and other.dtype != x.dtype:
        raise ValueError(f"The two activations have different dtypes: {x.dtype} and {other.dtype}.")
    x = _ready(x)
    other = None if other is None else _ready(other)
    roots = None if roots is None else roots.contiguous()
    extension.add_moments(x, other, roots, hessian, cross, kernels, torch.get_num_threads())


def _ready(x: Tensor) -> Tensor:
    return (x if x.dtype in TYPES else x.float()).contiguous()


def _add_by_torch(x: Tensor, other: Tensor | None, roots: Tensor | None, hessian: Tensor, cross: Tensor | None) -> None:
    rows = _weighted(x, roots)
    # The matrix is symmetric: strips to the right of the diagonal are little more than half the work.
    for start in range(0, rows.shape[1], _STRIP):
        hessian[start : start + _STRIP, start:].addmm_(rows[:, start : start + _STRIP].T, rows[:, start:])
    if other is not None and cross is not None:
        cross.addmm_((rows if other is x else _weighted(other, roots)).T, rows)


def _weighted(x: Tensor, roots: Tensor | None) -> Tensor:
    # With the root on both sides, the result is symmetric and positive despite rounding.
    return x.float() if roots is None else x.float() * roots.unsqueeze(1)
