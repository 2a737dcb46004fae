"""The product with a compressed matrix on a GPU: supported layouts, preparation, and the kernel for a number of rows.

Data: a `TritonWeight` (views of the stored tensors) and activations `[..., in]`; nothing as large as the dense matrix
is written. Importing this module imports triton, which is optional (extra `triton`; torch for CUDA includes it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shiftadd_cli.kernels.triton_gemm import gemm
from shiftadd_cli.kernels.triton_gemv import gemv
from shiftadd_cli.kernels.triton_weight import TritonWeight, prepare, supports

__all__ = ["GEMV_ROWS", "TritonWeight", "multiply", "prepare", "supports"]

# Largest number of rows of activations for the GEMV, by dtype; the kernels support only these dtypes. The numbers are
# estimates, not measurements. Compiled for 3 bits, the GEMV has about 10 instructions per weight and row. The GEMM has
# 11 for up to 16 rows, and 16 more without tensor cores, but is harder to keep busy. scripts/benchmark_gpu.py times
# both.
GEMV_ROWS = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}


def multiply(x: Tensor, weight: TritonWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ W'ᵀ + bias` for the planes W' (row scale and offset included): `[..., in]` → `[..., out]`.

    `x`: float32, float16 or bfloat16, on the device of `weight`, already rotated if W' is for rotated inputs; `bias`
    `[out]`. The result has the dtype of `x`; sums are float32. The GEMV multiplies by the exact weights, the GEMM by
    weights rounded to the dtype of `x`. Raises RuntimeError if `x` requires a gradient: there is no backward pass.
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
    # Triton launches on the current device, which may be another one if a model spans several.
    with torch.cuda.device_of(flat):
        return kernel(flat, weight, bias).view(*x.shape[:-1], outputs)
