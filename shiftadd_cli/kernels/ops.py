"""The kernels as torch operators, so that torch.compile and its checks can handle them.

    shiftadd::lookup_linear     a compressed linear layer on a CPU
    shiftadd::rotate            the rotation of its input, on a CPU
    shiftadd::triton_linear     a compressed linear layer on a GPU
    shiftadd::codes_linear      a product with rows of 8-bit codes, on a CPU
    shiftadd::gather_rows       rows of a compressed matrix, on a CPU

They are for inference: a backward pass through them raises RuntimeError.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.kernels.cpu_weight import CpuWeight, native_layout
from shiftadd_cli.kernels.triton_weight import TritonWeight
from shiftadd_cli.native.extension import TYPES, cpu_extension

METHODS = {"auto": 0, "look-up": 1, "multiply": 2}

_library = torch.library.Library("shiftadd", "DEF")
_library.define(
    "lookup_linear(Tensor x, Tensor words, Tensor? scale_codes, Tensor? scales, Tensor? offsets, Tensor row_scale, "
    "Tensor? bias, Tensor? signs, int group_columns, int bits, int planes, bool fast, str method, str kernels) "
    "-> Tensor"
)
_library.define("rotate(Tensor x, Tensor signs) -> Tensor")
_library.define("codes_linear(Tensor x, Tensor codes, Tensor scale) -> Tensor")
_library.define(
    "gather_rows(Tensor ids, Tensor words, Tensor? scale_codes, Tensor? scales, Tensor? offsets, Tensor row_scale, "
    "int columns, int group_columns, int bits, int planes) -> Tensor"
)
_library.define(
    "triton_linear(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor row_scale, Tensor? bias, "
    "int columns, int bits, int planes, int nibbles, int groups, int group_words) -> Tensor"
)


def is_plain(x: Tensor) -> bool:
    """Whether only the result of a computation with `x` matters: `x` is a tensor on a CPU, outside of gradients,
    compilers, tracing and modes. All of those need the dispatch through torch, which takes ten microseconds."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def lookup_linear(
    x: Tensor,
    words: Tensor,
    scale_codes: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    row_scale: Tensor,
    bias: Tensor | None,
    signs: Tensor | None,
    group_columns: int,
    bits: int,
    planes: int,
    fast: bool,
    method: str = "auto",
    kernels: str = "",
) -> Tensor:
    """`x` `[..., in]` → `[..., out]` in the dtype of `x`, which is float32, bfloat16 or float16.

    words to row_scale: fields of a `CpuWeight`; bias: `[out]` or None; signs: those of the weight if `x` is not rotated
    yet; bits and planes: numbers of stored and computed planes. fast: use 16-bit tables. method: one of `METHODS`;
    kernels: an instruction set, "" for the best.
    """
    stored = words, scale_codes, scales, offsets, row_scale
    args = (x, *stored, bias, signs, group_columns, bits, planes, fast, method, kernels)
    if is_plain(x) and words.is_cpu:
        return _lookup_linear(*args)
    result: Tensor = torch.ops.shiftadd.lookup_linear.default(*args)
    return result


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """R x for `x` `[..., in]`, see `bcq.rotation`, in the dtype of `x`; signs: float32 `[in]` of ±1."""
    if is_plain(x) and signs.is_cpu:
        return _rotate(x, signs)
    result: Tensor = torch.ops.shiftadd.rotate.default(x, signs)
    return result


def codes_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """(x @ codes.T) * scale: `x` `[rows, in]`, codes int8 `[out, in]`, scale `[out]` → `[rows, out]`.

    x has the dtype of the result: float32, bfloat16 or float16. scale is float32 or bfloat16.
    """
    result: Tensor = torch.ops.shiftadd.codes_linear.default(x, codes, scale)
    return result


def gather_rows(ids: Tensor, weight: CpuWeight, layout: PackedLayout) -> Tensor:
    """The rows `ids` `[...]` of the matrix that `lookup_linear` multiplies (rotated) inputs by: float32 `[..., in]`,
    with the bits of `QuantizedWeight.decode_stored`. Raises IndexError for a row that is not there."""
    args = (
        ids,
        weight.words,
        weight.scale_codes,
        weight.scales,
        weight.offsets,
        weight.row_scale,
        layout.columns,
        layout.grid.group_columns,
        layout.bits,
        layout.planes,
    )
    if is_plain(ids) and weight.words.is_cpu:
        return _gather_rows(*args)
    result: Tensor = torch.ops.shiftadd.gather_rows.default(*args)
    return result


def gpu_linear(x: Tensor, weight: TritonWeight, bias: Tensor | None) -> Tensor:
    """`x` `[..., in]` → `[..., out]`, where `x` is rotated if the weight is; see `triton_linear.multiply`."""
    result: Tensor = torch.ops.shiftadd.triton_linear.default(
        x,
        weight.codes,
        weight.scales,
        weight.offsets,
        weight.row_scale,
        bias,
        weight.columns,
        weight.bits,
        weight.planes,
        weight.nibbles,
        weight.groups,
        weight.group_words,
    )
    return result


def _lookup_linear(
    x: Tensor,
    words: Tensor,
    scale_codes: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    row_scale: Tensor,
    bias: Tensor | None,
    signs: Tensor | None,
    group_columns: int,
    bits: int,
    planes: int,
    fast: bool,
    method: str,
    kernels: str,
) -> Tensor:
    rows, columns = row_scale.shape[0], x.shape[-1]
    bias = None if bias is None else bias.float().contiguous()
    activations = _ready(x)
    output = torch.empty(*x.shape[:-1], rows, dtype=activations.dtype)
    extension, layout = _extension(), native_layout(rows, columns, group_columns, bits, planes)
    projection = extension.Projection(layout, words, scale_codes, scales, offsets, row_scale, bias, signs)
    extension.linear(projection, activations, output, fast, METHODS[method], kernels, torch.get_num_threads())
    return output if output.dtype == x.dtype else output.to(x.dtype)


def _rotate(x: Tensor, signs: Tensor) -> Tensor:
    activations = _ready(x)
    output = torch.empty_like(activations)
    _extension().rotate(activations, signs, output, torch.get_num_threads())
    return output if output.dtype == x.dtype else output.to(x.dtype)


def _codes_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    activations = _ready(x)
    output = torch.empty(x.shape[0], codes.shape[0], dtype=activations.dtype)
    _extension().codes_linear(codes, scale.contiguous(), activations, output, torch.get_num_threads())
    return output if output.dtype == x.dtype else output.to(x.dtype)


def _gather_rows(
    ids: Tensor,
    words: Tensor,
    scale_codes: Tensor | None,
    scales: Tensor | None,
    offsets: Tensor | None,
    row_scale: Tensor,
    columns: int,
    group_columns: int,
    bits: int,
    planes: int,
) -> Tensor:
    output = torch.empty(*ids.shape, columns, dtype=torch.float32)
    extension, layout = _extension(), native_layout(row_scale.shape[0], columns, group_columns, bits, planes)
    projection = extension.Projection(layout, words, scale_codes, scales, offsets, row_scale, None, None)
    numbers = ids.reshape(-1).to(torch.int64).contiguous()
    extension.gather(projection, numbers, output.view(-1, columns), torch.get_num_threads())
    return output


def _triton_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    row_scale: Tensor,
    bias: Tensor | None,
    columns: int,
    bits: int,
    planes: int,
    nibbles: int,
    groups: int,
    group_words: int,
) -> Tensor:
    # Triton is optional, and takes a second to import.
    from shiftadd_cli.kernels.triton_linear import multiply

    weight = TritonWeight(codes, scales, offsets, row_scale, columns, bits, planes, nibbles, groups, group_words)
    # Detached, because all operators here refuse gradients in the backward pass, not before.
    return multiply(x.detach(), weight, bias)


def _ready(x: Tensor) -> Tensor:
    """`x` as the kernels take it: contiguous, float32 or bfloat16."""
    if x.dtype == torch.float16:
        x = x.float()
    if x.dtype not in TYPES:
        raise RuntimeError(f"Compressed layers take float32, bfloat16 or float16 activations, not {x.dtype}.")
    return x.contiguous()


def _extension() -> Any:
    extension = cpu_extension()
    if extension is None:
        raise RuntimeError("This installation of shiftadd has no compiled kernels.")
    return extension


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "The kernels of compressed layers have no gradient; load the model with "
        "SHIFTADD_KERNEL=reference, or call its dequantize()."
    )


_library.impl("lookup_linear", _lookup_linear, "CPU")
_library.impl("rotate", _rotate, "CPU")
_library.impl("codes_linear", _codes_linear, "CPU")
_library.impl("gather_rows", _gather_rows, "CPU")
_library.impl("triton_linear", _triton_linear, "CUDA")
# For the interpreter of Triton, which runs on the CPU.
_library.impl("triton_linear", _triton_linear, "CPU")
for _name in ("lookup_linear", "rotate", "codes_linear", "gather_rows", "triton_linear"):
    torch.library.register_autograd(f"shiftadd::{_name}", _refuse, lib=_library)


@torch.library.register_fake("shiftadd::lookup_linear", lib=_library)
def _fake_linear(x: Tensor, words: Tensor, *rest: Any) -> Tensor:
    row_scale: Tensor = rest[3]
    return x.new_empty(*x.shape[:-1], row_scale.shape[0])


@torch.library.register_fake("shiftadd::codes_linear", lib=_library)
def _fake_codes_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@torch.library.register_fake("shiftadd::gather_rows", lib=_library)
def _fake_gather_rows(ids: Tensor, words: Tensor, *rest: Any) -> Tensor:
    columns: int = rest[4]
    return words.new_empty(*ids.shape, columns, dtype=torch.float32)


@torch.library.register_fake("shiftadd::triton_linear", lib=_library)
def _fake_triton(
    x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, row_scale: Tensor, *_: Any
) -> Tensor:
    return x.new_empty(*x.shape[:-1], row_scale.shape[0])


@torch.library.register_fake("shiftadd::rotate", lib=_library)
def _fake_rotate(x: Tensor, signs: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
