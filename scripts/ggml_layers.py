"""llama.cpp's matrix product on its own quantized weights, from the library that scripts/ggml builds."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

# ggml's formats with about as many bits, in its spelling.
FORMATS = {2: "q2_K", 3: "q3_K", 4: "q4_0"}


class GgmlLibrary:
    """The functions of `matmul.cpp`. Raises OSError for any other file."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path.resolve()))
        try:
            self.library.matmul_create.restype = c_void_p
            self.library.matmul_create.argtypes = [
                c_char_p, *[c_int64] * 4, c_int, c_bool, POINTER(c_float), POINTER(c_float),
            ]  # fmt: skip
            self.library.matmul_bytes.restype, self.library.matmul_bytes.argtypes = c_int64, [c_void_p]
            self.library.matmul_run.restype, self.library.matmul_run.argtypes = c_bool, [c_void_p]
            self.library.matmul_result.argtypes = [c_void_p, POINTER(c_float)]
            self.library.matmul_result.restype = None
            self.library.matmul_free.argtypes, self.library.matmul_free.restype = [c_void_p], None
        except AttributeError as failure:
            raise OSError(f"{path} was not built from scripts/ggml") from failure


class GgmlLayers:
    """`copies` weights of one type, which multiply the same activations one after another.

        with GgmlLayers(library, "q2_K", weight, x, copies=8, threads=2, repack=True) as layers:
            layers.run()

    weight float32 `[out, in]`, x float32 `[batch, in]`. Raises ValueError if ggml cannot compute this: an unknown type,
    columns that are not a multiple of its blocks, or, with `repack`, no repacked layout for this type and shape.
    """

    def __init__(
        self, library: GgmlLibrary, kind: str, weight: Tensor, x: Tensor, *, copies: int, threads: int, repack: bool
    ) -> None:
        self.library, self.copies, self.batch, self.rows = library.library, copies, len(x), len(weight)
        weight, x = weight.float().contiguous(), x.float().contiguous()
        self._problem = self.library.matmul_create(
            kind.encode(), *weight.shape, len(x), copies, threads, repack, _floats(weight), _floats(x)
        )
        if not self._problem:
            product = "repacked layout for" if repack else "product of"
            raise ValueError(f"ggml has no {product} {kind} weights of {len(weight)} x {weight.shape[1]}")

    def __enter__(self) -> GgmlLayers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.library.matmul_free(self._problem)

    @property
    def nbytes(self) -> int:
        """Bytes of one weight."""
        return int(self.library.matmul_bytes(self._problem))

    def run(self) -> None:
        """Multiply every copy once."""
        if not self.library.matmul_run(self._problem):
            raise RuntimeError("ggml could not compute the product")

    def result(self) -> Tensor:
        """The product with the last copy, float32 `[batch, out]`."""
        product = torch.empty(self.batch, self.rows)
        self.library.matmul_result(self._problem, _floats(product))
        return product


def _floats(tensor: Tensor) -> ctypes._Pointer[c_float]:
    return ctypes.cast(tensor.data_ptr(), POINTER(c_float))
