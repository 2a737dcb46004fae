"""The product by a compressed matrix on a GPU: which layouts, what to prepare, and which kernel for how many rows.

Data: a `TritonWeight` (views of the stored tensors) and activations `[..., in]`; nothing of the size of the dense
matrix is written. Importing this module imports triton, which is optional (extra `triton`; torch for CUDA brings it
along).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.kernels.triton_gemm import gemm
from shiftadd_cli.kernels.triton_gemv import gemv
from shiftadd_cli.kernels.triton_weight import TritonWeight, prepare, supports

__all__ = ["GEMV_ROWS", "TritonWeight", "multiply", "prepare", "supports"]

# Rows of activations up to which the GEMV is taken, by dtype; these are the dtypes there are kernels for. Estimates,
# not measured: compiled for 3 bits, the GEMV has some 10 instructions per weight and row; the GEMM has 11 for up to 16
# rows, and 16 more where it has no tensor cores, but is harder to keep busy. scripts/benchmark_gpu.py times both.
GEMV_ROWS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


def multiply(x: Tensor, weight: TritonWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ W'ᵀ + bias` of the planes W' (row scale and offset included): `[..., in]` → `[..., out]`.

    `x`: float32, float16 or bfloat16, on the device of `weight`, already rotated if W' is of rotated inputs; `bias`
    `[out]`. The result has the dtype of `x`; sums are float32. The GEMV multiplies by the exact weights, the GEMM by
    weights rounded to the dtype of `x`. Raises RuntimeError where a gradient of `x` would be wanted: there is none.
    """
    if x.dtype not in GEMV_ROWS:
        raise TypeError(f"no kernel for activations of {x.dtype}")
    if x.shape[-1] != weight.columns:
        raise ValueError(f"activations of width {x.shape[-1]} for a matrix of {weight.columns} columns")
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("the Triton kernels have no backward pass")
    flat = x.reshape(-1, weight.columns)
    outputs = weight.row_scale.shape[0]
    if not len(flat):
        return x.new_empty(*x.shape[:-1], outputs)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    kernel = gemv if len(flat) <= GEMV_ROWS[x.dtype] else gemm
    # Triton launches on the current device, which need not be the one of a model spread over several.
    with torch.cuda.device_of(flat):
        return kernel(flat, weight, bias).view(*x.shape[:-1], outputs)
