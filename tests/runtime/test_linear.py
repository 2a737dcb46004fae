"""PackedLinear, compared with a slow decoder that follows the format's description byte by byte."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from artifacts import FORMATS, random_weight
from formats import layout_on, matrix_format
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from shiftadd_cli.bcq import weight as weight_module
from shiftadd_cli.bcq.choices import Primitive
from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.kernels.select import Kernel
from shiftadd_cli.runtime import linear
from shiftadd_cli.runtime.linear import PackedLinear


def layout(
    rows: int = 24,
    columns: int = 40,
    group_rows: int | str = 1,
    group_size: int | str = 16,
    *,
    bits: int = 3,
    form: str = "apot2",
    row_scale: bool = True,
    offset: bool = False,
    rotation: bool = False,
    outliers: int = 0,
) -> PackedLayout:
    grid = ScaleGrid.resolve(rows, columns, group_rows, group_size)
    return layout_on(grid, bits, form, row_scale, offset, rotation, outliers)


def slow_decode(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """The matrix in float64, one weight at a time, and the sum of the absolute values of its terms."""
    lay, stored = weight.layout, {name: tensor.tolist() for name, tensor in weight.tensors.items()}
    nibbles = {"pot": 1, "apot2": 2, "apot3": 3, "float": 0}[lay.scales.scale_format]

    def nibble(row: list[int], index: int) -> int:
        return row[index // 2] >> 4 * (index % 2) & 15

    def ratio(r: int, c: int, b: int) -> float:
        if not nibbles:
            return stored["weight_scales"][r][c][b]
        first = (c * lay.bits + b) * nibbles
        exponent, *terms = (nibble(stored["weight_exponents"][r], first + k) for k in range(nibbles))
        if exponent == 15:
            return 0.0
        value, power = 2.0**-exponent, exponent
        for term in terms:
            power += term % 8
            if term % 8:
                value += (-1 if term >= 8 else 1) * 2.0**-power
        return value

    def offset(r: int, c: int) -> float:
        if not lay.scales.offset:
            return 0.0
        if not nibbles:
            return stored["weight_offset"][r][c]
        eighths = nibble(stored["weight_offset"][r], c)
        return (eighths - 16 if eighths > 7 else eighths) / 8 * max(ratio(r, c, b) for b in range(lay.bits))

    values = torch.zeros(lay.grid.rows, lay.grid.columns, dtype=torch.float64)
    sizes = torch.zeros_like(values)
    for o in range(lay.grid.rows):
        row_scale = stored["weight_row_scale"][o if lay.scales.row_scale else 0]
        for i in range(lay.grid.columns):
            r, c = o // lay.grid.group_rows, i // lay.grid.group_columns
            terms = [offset(r, c)]
            for b in range(lay.bits):
                sign = 1 if stored["weight_codes"][o][b][i // 8] >> i % 8 & 1 else -1
                terms.append(sign * ratio(r, c, b))
            values[o, i] = row_scale * sum(terms)
            sizes[o, i] = abs(row_scale) * sum(map(abs, terms))
    return values, sizes


@st.composite
def layouts(draw: st.DrawFn) -> PackedLayout:
    shapes: list[tuple[int | str, int | str]] = [(1, 8), (1, "all"), ("all", 1), ("1/8", 8), ("all", "all")]
    group_rows, group_size = draw(st.sampled_from(shapes) | st.tuples(st.integers(1, 9), st.integers(1, 20)))
    return layout(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 27)),
        group_rows,
        group_size,
        bits=draw(st.integers(1, 8)),
        form=draw(st.sampled_from(FORMATS)),
        row_scale=draw(st.booleans()),
        offset=draw(st.booleans()),
        rotation=draw(st.booleans()),
    )


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(layouts(), st.integers(0, 2**31))
def test_decode_follows_the_format(lay: PackedLayout, seed: int) -> None:
    weight = random_weight(lay, seed)
    expected, sizes = slow_decode(weight)
    error = (weight.decode_stored().double() - expected).abs()
    assert (error <= sizes * 12 * torch.finfo(torch.float32).eps).all()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(layouts(), st.integers(1, 10))
def test_tiles_equal_the_decoded_matrix(lay: PackedLayout, height: int) -> None:
    weight = random_weight(lay)
    decoded = weight.decode_stored()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_module, "_CACHED_WEIGHTS", 3 * lay.grid.columns)
        assert torch.equal(weight.decode_stored(), decoded)
    covered = 0
    for rows, tile in weight.tiles(height):
        assert rows.start == covered
        assert tile.shape[0] <= height
        assert torch.equal(tile, decoded[rows])
        covered = rows.stop
    assert covered == lay.grid.rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("rows_per_tile", [1000, 7])
def test_forward_is_the_dense_product(
    dtype: torch.dtype, leading: tuple[int, ...], rows_per_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "TILE_BYTES", 4 * 40 * rows_per_tile)
    g = torch.Generator().manual_seed(1)
    layer = PackedLinear.from_weight(random_weight(layout()), torch.randn(24, generator=g), dtype=torch.float32)
    x = torch.randn(*leading, 40, generator=g).to(dtype)
    dense = layer.decode().to(dtype)
    assert layer.bias is not None
    bias = layer.bias.to(dtype)
    result = layer(x)
    assert result.dtype == dtype
    assert result.shape == (*leading, 24)
    exact = functional.linear(x.double(), dense.double(), bias.double())
    bound = x.double().abs() @ dense.double().abs().T + bias.double().abs()
    # One rounding of the result, and accumulation in at least float32.
    assert ((result.double() - exact).abs() <= bound * 64 * torch.finfo(torch.float32).eps
            + exact.abs() * torch.finfo(dtype).eps).all()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("outliers", [0, 3])
def test_forward_rotates_the_input_and_adds_outlier_columns(dtype: torch.dtype, rotation: bool, outliers: int) -> None:
    """In exact arithmetic the output is the product of the decoded matrix and the input before rotation."""
    weight = random_weight(layout(columns=48, rotation=rotation, outliers=outliers))
    layer = PackedLinear.from_weight(weight, torch.ones(24))
    assert (layer.decode() == weight.decode_planes()).all(0).sum() == 48 - outliers
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert layer.bias is not None
    exact = functional.linear(x.double(), layer.decode().double(), layer.bias.double())
    bound = x.double().abs().amax() * 48 * layer.decode().double().abs().amax()
    assert ((layer(x).double() - exact).abs() <= 4 * bound * max(torch.finfo(dtype).eps, 1e-6)).all()


def test_single_tile_equals_the_dense_layer_exactly() -> None:
    layer = PackedLinear.from_weight(random_weight(layout()))
    x = torch.randn(6, 40)
    assert torch.equal(layer(x), functional.linear(x, layer.decode()))


def test_gradients_reach_the_input_but_no_stored_tensor() -> None:
    layer = PackedLinear.from_weight(random_weight(layout()))
    x = torch.randn(3, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.decode().sum(0).expand(3, -1), rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("outliers", [0, 2])
@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.float16),
                                  lambda m: m.type(torch.float16)])  # fmt: skip
def test_dtype_moves_leave_stored_tensors_alone(
    form: str, offset: bool, outliers: int, move: Callable[[nn.Module], PackedLinear]
) -> None:
    weight = random_weight(layout(form=form, offset=offset, outliers=outliers))
    # This row scale overflows in float16.
    weight.tensors["weight_row_scale"][3] = 2.0**20
    layer = PackedLinear.from_weight(weight, torch.ones(24))
    before = layer.decode()
    moved = move(layer)
    assert torch.equal(moved.decode(), before)
    for name, (_, dtype) in weight.layout.tensors().items():
        assert moved.get_parameter(name).dtype == dtype
    assert moved.bias is not None
    assert moved.bias.dtype == moved.weight.dtype != torch.float32


def test_dtype_of_a_layer_without_bias_changes_too() -> None:
    layer = PackedLinear.from_weight(random_weight(layout()))
    assert layer.weight.dtype == torch.float32
    assert nn.Sequential(layer).to(torch.bfloat16)[0].weight.dtype == torch.bfloat16


def test_stand_in_weight_has_shape_dtype_and_device_but_no_memory() -> None:
    layer = PackedLinear(layout(), bias=False, device="meta", dtype=torch.bfloat16)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((24, 40), torch.bfloat16, "meta")
    layer = PackedLinear.from_weight(random_weight(layout()))
    assert layer.weight.device.type == "cpu"
    assert layer.weight.untyped_storage().nbytes() == 4
    assert layer.weight.isnan().all()
    assert "weight" not in layer.state_dict()
    assert "weight" not in dict(layer.named_parameters())
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.zeros(24, 40))  # type: ignore[misc]


@pytest.mark.parametrize("form", FORMATS)
def test_state_dict_holds_the_stored_tensors(form: str) -> None:
    weight = random_weight(layout(form=form, offset=True))
    layer = PackedLinear.from_weight(weight, torch.ones(24))
    assert layer.state_dict().keys() == weight.tensors.keys() | {"bias"}
    assert not any(layer.get_parameter(name).requires_grad for name in weight.tensors)
    empty = PackedLinear(weight.layout, bias=True)
    empty.load_state_dict(layer.state_dict())
    on_meta = PackedLinear(weight.layout, bias=True, device="meta")
    on_meta.load_state_dict(layer.state_dict(), assign=True)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (empty, on_meta, loaded, copy.deepcopy(layer)):
        assert torch.equal(other.decode(), layer.decode())


def test_decoding_ignores_the_default_dtype() -> None:
    weight = random_weight(layout(offset=True))
    expected = weight.decode()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(weight.decode(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize(("primitive", "bits"), [("shift1", 4), ("shift2", 5)])
def test_shift_layers_compute_in_every_dtype_and_pass_gradients_on(
    primitive: Primitive, bits: int, rotation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = matrix_format(bits, scale_format="pot", rotation=rotation, outlier_columns=0.1, primitive=primitive)
    lay = PackedLayout(form, 24, 40)
    weight = random_weight(lay)
    layer = PackedLinear.from_weight(weight, torch.randn(24, generator=torch.Generator().manual_seed(1)))
    monkeypatch.setattr(linear, "TILE_BYTES", 4 * 40 * 7)
    layer.prepare()
    assert layer.kernel is Kernel.REFERENCE
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    output = layer(x)
    assert output.dtype == dtype
    assert layer.bias is not None
    expected = functional.linear(x.double(), weight.decode().double(), layer.bias.double())
    rounding = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert (output - expected).norm() <= rounding * expected.norm()
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert (gradient - weight.decode().double().sum(0)).norm() <= rounding * 3 * weight.decode().sum(0).norm()
    state = copy.deepcopy(layer).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weight.tensors.items())
