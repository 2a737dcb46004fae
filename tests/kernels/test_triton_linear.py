"""The Triton kernels, compared with products in float64.

They are interpreted on the CPU. That checks the results of the kernels but not their compilation, which
`test_triton_compile` does. TRITON_INTERPRET=0 runs the same tests on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from formats import layout_on
from kernel_problems import assert_product, decode_exactly, row_wise
from torch import Tensor

from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.weight import QuantizedWeight

pytest.importorskip("triton", reason="triton is not installed")

from shiftadd_cli.kernels import triton_linear
from shiftadd_cli.kernels.triton_gemm import gemm
from shiftadd_cli.kernels.triton_gemv import gemv
from shiftadd_cli.kernels.triton_linear import multiply, prepare, supports
from shiftadd_cli.kernels.triton_passes import choose_splits

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("TRITON_INTERPRET=0 needs a CUDA GPU", allow_module_level=True)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
KERNELS = pytest.mark.parametrize("kernel", [gemv, gemm])

# rows, columns, group size, bits, scale format: words of 32 columns first, then those of 8.
WEIGHTS = [
    row_wise(24, 128, 32, 3, "pot"),
    row_wise(10, 256, 128, 2, "apot2", offset=True),
    row_wise(17, 192, 64, 4, "apot3", offset=True, row_scale=False),
    row_wise(7, 96, "all", 6, "float"),
    # The last word and the last group are partial, and there is more than one tile.
    row_wise(3, 2136, 64, 2, "apot2"),
    row_wise(65, 62, "all", 1, "pot", row_scale=False),
    # Bytes.
    row_wise(9, 100, 40, 1, "apot3", offset=True),
    row_wise(5, 13, "all", 8, "pot", offset=True),
    row_wise(33, 75, 8, 7, "float", offset=True),
    row_wise(1, 1, "all", 1, "apot2"),
    # Trellis-coded planes: words and bytes, every number of stored bits, rows of a second stripe.
    row_wise(20, 128, 64, 1, "apot2", primitive="trellis1"),
    row_wise(270, 64, "all", 2, "apot2", primitive="trellis1"),
    row_wise(9, 100, 40, 3, "apot3", offset=True, primitive="trellis1"),
    row_wise(67, 45, "all", 4, "float", primitive="trellis1"),
    row_wise(259, 13, "all", 2, "pot", offset=True, primitive="trellis2"),
    row_wise(12, 288, 32, 3, "apot2", row_scale=False, primitive="trellis2"),
]


def name(weight: QuantizedWeight) -> str:
    layout = weight.layout
    grid = layout.grid
    form = f"{layout.primitive.name}-{layout.bits}{layout.scales.scale_format}"
    return f"{grid.rows}x{grid.columns}-{grid.group_columns}-{form}"


def on_device(weight: QuantizedWeight) -> QuantizedWeight:
    return QuantizedWeight(weight.layout, {name: tensor.to(DEVICE) for name, tensor in weight.tensors.items()})


def inputs(rows: int, weight: QuantizedWeight, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Normal activations, with one in sixteen columns much larger."""
    columns = weight.layout.grid.columns
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:, ::16] *= 50
    return x.to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Widen bfloat16 before products: Triton's interpreter stores it as integers of its bits, and multiplies those."""
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply_as_is = InterpreterBuilder.create_dot

    def widen(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others: object) -> TensorHandle:
        return multiply_as_is(self, widen(a), widen(b), *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize(("kernel", "rows"), [(gemv, 1), (gemv, 3), (gemm, 3)])
@pytest.mark.parametrize("weight", WEIGHTS, ids=name)
def test_products_match_the_decoded_matrix(kernel: Callable[..., Tensor], rows: int, weight: QuantizedWeight) -> None:
    weight = on_device(weight)
    x = inputs(rows, weight)
    assert_product(kernel(x, prepare(weight)), x, weight, rounded=kernel is gemm)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [WEIGHTS[1], WEIGHTS[8]], ids=name)
def test_products_in_half_precision_match_the_decoded_matrix(
    kernel: Callable[..., Tensor], dtype: torch.dtype, weight: QuantizedWeight
) -> None:
    weight = on_device(weight)
    x = inputs(2, weight, dtype)
    bias = torch.linspace(-50, 50, weight.layout.grid.rows, device=DEVICE).to(dtype)
    y = kernel(x, prepare(weight), bias)
    assert y.dtype == dtype
    assert_product(y, x, weight, bias, rounded=kernel is gemm)


@pytest.mark.parametrize(("rows", "dtype"), [(8, torch.float32), (65, torch.float32), (130, torch.float16)])
def test_products_of_many_rows_match_the_decoded_matrix(rows: int, dtype: torch.dtype) -> None:
    weight = on_device(WEIGHTS[6])
    x = inputs(rows, weight, dtype)
    kernel = gemv if rows == 8 else gemm
    assert_product(kernel(x, prepare(weight)), x, weight, rounded=kernel is gemm)


@KERNELS
def test_every_column_uses_its_own_weights(kernel: Callable[..., Tensor]) -> None:
    """Each row has a single input, 2^100, so that no other input can hide a weight of another column."""
    weight = on_device(row_wise(3, 45, 16, 2, "pot", offset=True))
    x = torch.eye(45, device=DEVICE) * 2.0**100
    values, sizes = decode_exactly(weight)
    product = kernel(x, prepare(weight)).double() / 2.0**100
    assert ((product - values.T).abs() <= 4 * torch.finfo(torch.float32).eps * sizes.T).all()


@KERNELS
@pytest.mark.parametrize(("form", "zero"), [("pot", 0xFF), ("apot2", 0x3F), ("apot3", 0xFF), ("float", 0)])
def test_zero_scales_and_zero_inputs_give_zeros(kernel: Callable[..., Tensor], form: str, zero: int) -> None:
    weight = on_device(row_wise(6, 64, 32, 3, form))
    zeros = torch.zeros(2, 64, device=DEVICE)
    assert (kernel(zeros, prepare(weight)) == 0).all()
    weight.tensors["weight_scales" if form == "float" else "weight_exponents"].fill_(zero)
    assert (kernel(inputs(2, weight), prepare(weight)) == 0).all()


def test_every_scale_code_is_decoded() -> None:
    """Every row has one code as its only scale: all codes of one and two nibbles, and every 7th of three."""
    for nibbles, form in enumerate(("pot", "apot2", "apot3"), start=1):
        codes = torch.arange(0, 16**nibbles, 7 if nibbles == 3 else 1)
        # Both planes have the same code. For an odd number of nibbles, the second one begins inside a byte.
        weight = row_wise(len(codes), 8, "all", 2, form, row_scale=False)
        weight.tensors["weight_codes"].fill_(255)
        both_planes = codes | codes << (4 * nibbles)
        stored = weight.tensors["weight_exponents"]
        for byte in range(stored.shape[1]):
            stored[:, byte] = (both_planes >> (8 * byte) & 255).to(torch.uint8)
        weight = on_device(weight)
        values, sizes = decode_exactly(weight)
        x = torch.zeros(1, 8, device=DEVICE)
        x[0, 5] = 1.0
        y = gemv(x, prepare(weight))
        assert ((y[0].double() - values[:, 5]).abs() <= torch.finfo(torch.float32).eps * sizes[:, 5]).all()
        assert values[:, 5].unique().numel() >= 16


def test_neighbours_do_not_change_the_bits_of_a_row() -> None:
    weight = prepare(on_device(WEIGHTS[4]))
    x = inputs(2, WEIGHTS[4])
    together = gemv(x, weight)
    for row in range(2):
        assert torch.equal(gemv(x[row : row + 1], weight), together[row : row + 1])


@pytest.mark.parametrize("leading", [(), (3,), (2, 1), (0,), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_multiply_keeps_leading_axes_and_the_dtype(leading: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = on_device(row_wise(10, 64, 32, 2, "apot2"))
    x = torch.randn(*leading, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    bias = torch.linspace(-1, 1, 10, device=DEVICE)
    y = multiply(x, prepare(weight), bias)
    assert (y.shape, y.dtype) == ((*leading, 10), dtype)
    assert_product(y.reshape(-1, 10), x.reshape(-1, 64), weight, bias, rounded=True)


def test_multiply_accepts_activations_that_are_not_contiguous() -> None:
    weight = on_device(row_wise(4, 64, 32, 2, "pot"))
    x = inputs(6, weight)
    for view in (x[::3], x.T.contiguous().T, x[:, None].expand(6, 2, 64)):
        assert torch.equal(multiply(view, prepare(weight)), multiply(view.contiguous(), prepare(weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multiply_chooses_the_kernel_by_the_number_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = prepare(on_device(row_wise(4, 64, 32, 1, "pot")))
    called: list[str] = []

    def spy_on(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(x: Tensor, *others: Any) -> Tensor:
            called.append(kernel.__name__)
            return kernel(x, *others)

        return spy

    for kernel in (gemv, gemm):
        monkeypatch.setattr(triton_linear, kernel.__name__, spy_on(kernel))
    limit = triton_linear.GEMV_ROWS[dtype]
    for rows in (limit, limit + 1):
        multiply(torch.ones(rows, 64, device=DEVICE, dtype=dtype), weight)
    assert called == ["gemv", "gemm"]


def test_multiply_refuses_unsupported_activations() -> None:
    weight = prepare(on_device(row_wise(4, 64, 32, 1, "pot")))
    with pytest.raises(TypeError, match="float64"):
        multiply(torch.ones(1, 64, dtype=torch.float64, device=DEVICE), weight)
    with pytest.raises(ValueError, match=r"width 63 .* 64 columns"):
        multiply(torch.ones(1, 63, device=DEVICE), weight)
    x = torch.ones(1, 64, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="no backward pass"):
        multiply(x, weight)
    with torch.no_grad():
        assert multiply(x, weight).shape == (1, 4)


@pytest.mark.parametrize("weight", WEIGHTS, ids=name)
def test_prepare_copies_neither_codes_nor_scales(weight: QuantizedWeight) -> None:
    weight = on_device(weight)
    stored, ready = weight.tensors, prepare(weight)
    assert ready.codes.data_ptr() == stored["weight_codes"].data_ptr()
    scales = stored["weight_exponents"] if ready.nibbles else stored["weight_scales"]
    assert ready.scales.data_ptr() == scales.data_ptr()
    if weight.layout.scales.offset:
        expected = weight.offsets(weight.ratios())
        assert expected is not None
        assert ready.offsets is not None
        assert torch.equal(ready.offsets.float(), expected)
        assert ready.offsets.dtype == (torch.float32 if weight.layout.scales.scale_format == "apot3" else torch.float16)


def test_codes_that_begin_inside_a_word_are_read_as_bytes() -> None:
    weight = on_device(row_wise(3, 64, 32, 2, "pot"))
    codes = weight.tensors["weight_codes"]
    file = torch.cat((torch.zeros(1, dtype=torch.uint8, device=DEVICE), codes.flatten()))
    moved = QuantizedWeight(weight.layout, weight.tensors | {"weight_codes": file[1:].view(codes.shape)})
    assert (prepare(weight).codes.dtype, prepare(moved).codes.dtype) == (torch.int32, torch.uint8)
    x = inputs(2, weight)
    assert_product(gemv(x, prepare(moved)), x, weight, rounded=False)


@pytest.mark.parametrize(
    ("group_rows", "group_size", "expected"),
    [(1, 64, True), (1, 8, True), (1, "all", True), (1, 12, False), (2, 64, False), ("all", 1, False),
     (1, 1000, True)],
)  # fmt: skip
def test_only_groups_of_whole_bytes_along_rows_are_supported(
    group_rows: int | str, group_size: int | str, expected: bool
) -> None:
    grid = ScaleGrid.resolve(16, 100, group_rows, group_size)
    assert supports(layout_on(grid, 3, "pot", True, False)) is expected


def test_splits_cover_all_tiles_and_none_is_empty() -> None:
    for tiles in range(1, 40):
        for programs in (1, 7, 100, 5000):
            splits, tiles_per_split = choose_splits(tiles, programs, 1024)
            assert (splits - 1) * tiles_per_split < tiles <= splits * tiles_per_split
            assert splits == 1 or programs < 1024
