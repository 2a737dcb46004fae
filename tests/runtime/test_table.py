"""Table modules, compared with dense modules of the decoded matrix."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from artifacts import random_weight
from formats import matrix_format
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from shiftadd_cli.bcq.int8 import encode_table
from shiftadd_cli.bcq.matrix_format import MatrixFormat
from shiftadd_cli.bcq.table_layout import TableLayout
from shiftadd_cli.runtime import table as table_module
from shiftadd_cli.runtime.table import (
    Int8Conv2d,
    Int8Embedding,
    Int8Linear,
    Int8Table,
    PackedTable,
    Table,
    can_hold_table,
    drop_table,
    hold_table,
)

IDS = torch.tensor([[0, 5, 29], [7, 7, 1]])


def filled(module: nn.Embedding | nn.Linear | nn.Conv2d, dtype: torch.dtype | None = None) -> Int8Table:
    codes, scale = encode_table(module.weight.detach(), "x")
    table = hold_table(module, TableLayout(tuple(module.weight.shape)), dtype)
    assert isinstance(table, Int8Table)
    table.weight_int8.data.copy_(codes)
    table.weight_int8_scale.copy_(scale)
    return table


def embedding() -> Int8Table:
    torch.manual_seed(0)
    return filled(nn.Embedding(30, 20))


def head(bias: bool = True) -> Int8Table:
    torch.manual_seed(1)
    return filled(nn.Linear(20, 30, bias=bias))


def patches() -> Int8Table:
    torch.manual_seed(2)
    return filled(nn.Conv2d(3, 10, (4, 2), stride=(4, 2)))


def bias_of(module: nn.Module) -> Tensor:
    bias = module.bias
    assert isinstance(bias, Tensor)
    return bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_patches_match_the_decoded_kernels(dtype: torch.dtype) -> None:
    module = patches().to(dtype)
    images = torch.randn(2, 3, 8, 8).to(dtype)
    result = module(images)
    assert result.dtype == dtype
    kernels = module.decode().to(dtype)
    assert torch.equal(result, functional.conv2d(images, kernels, bias_of(module), stride=(4, 2)))
    # Convolution by hand, in float64: a patch is one row.
    rows = functional.unfold(images.double(), (4, 2), stride=(4, 2)).transpose(1, 2)
    expected = rows @ kernels.double().flatten(1).T + bias_of(module).double()
    scale = rows.abs() @ kernels.double().flatten(1).abs().T + 1
    error = (result.flatten(2).transpose(1, 2).double() - expected).abs() / scale
    assert error.max() < 2 * torch.finfo(dtype).eps + 1e-7


def test_padding_and_groups_match_the_convolution() -> None:
    torch.manual_seed(3)
    dense = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect", bias=False)
    module = filled(copy.deepcopy(dense))
    dense.weight.data.copy_(module.decode())
    images = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert torch.equal(module(images), dense(images))
    drop_table(module, nn.Parameter(module.decode()))
    assert type(module) is nn.Conv2d
    assert torch.equal(module(images), dense(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS.int(), IDS[0, 1]], ids=lambda ids: f"{list(ids.shape)} {ids.dtype}")
def test_lookup_matches_the_decoded_matrix(dtype: torch.dtype, ids: Tensor) -> None:
    module = embedding().to(dtype)
    result = module(ids)
    assert result.dtype == dtype
    assert torch.equal(result, functional.embedding(ids, module.decode().to(dtype)))


@pytest.mark.parametrize("wrong", [-1, 30])
def test_ids_outside_the_table_are_refused(wrong: int) -> None:
    with pytest.raises(IndexError):
        embedding()(torch.tensor([0, wrong]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
@pytest.mark.parametrize("rows_per_tile", [1000, 7])
@pytest.mark.parametrize("bias", [True, False])
def test_head_is_the_dense_product(
    dtype: torch.dtype, leading: tuple[int, ...], rows_per_tile: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "TILE_BYTES", dtype.itemsize * 20 * rows_per_tile)
    module = head(bias).to(dtype)
    x = torch.randn(*leading, 20, generator=torch.Generator().manual_seed(2)).to(dtype)
    result = module(x)
    assert (result.dtype, result.shape) == (dtype, (*leading, 30))
    offset = bias_of(module).double() if bias else None
    exact = functional.linear(x.double(), module.decode().double(), offset)
    product = functional.linear(x.double(), module.decode().double())
    bound = x.double().abs() @ module.decode().double().abs().T
    eps = torch.finfo(dtype).eps
    # Codes are exact, so only the product is rounded, twice, and its sum with the bias.
    assert ((result.double() - exact).abs()
            <= bound * 64 * torch.finfo(torch.float32).eps + (product.abs() + exact.abs()) * eps).all()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_few_rows_are_multiplied_by_the_codes(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = filled(nn.Linear(64, 30)).to(dtype)
    x = torch.randn(rows, 1, 64).to(dtype)
    result = module(x)
    monkeypatch.setattr(table_module, "_ROWS_OF_CODES", {})
    decoded = module(x)
    assert (result.dtype, result.shape) == (dtype, (rows, 1, 30))
    torch.testing.assert_close(result, decoded, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    scale = module.weight_int8_scale.double()
    exact = (x.double() @ module.weight_int8.double().T) * scale + bias_of(module).double()
    bound = (x.double().abs() @ module.weight_int8.double().abs().T) * scale
    product = exact - bias_of(module).double()
    eps = torch.finfo(dtype).eps
    # The product is rounded, and so is its sum with the bias.
    assert ((result.double() - exact).abs() <= eps * (product.abs() + exact.abs()) + 1e-5 * bound).all()


def starting_at(start: int, tensor: torch.Tensor) -> torch.Tensor:
    """The same values, so many bytes after the start of a cache line, as in a memory-mapped file."""
    memory = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    first = -memory.data_ptr() % 64 + start
    target = memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return target.copy_(tensor)


@pytest.mark.parametrize("start", [2, 8, 16, 32])
def test_codes_and_inputs_may_start_anywhere_in_memory(start: int) -> None:
    torch.manual_seed(0)
    module = filled(nn.Linear(64, 30)).to(torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    expected = module(x)
    module.weight_int8.data = starting_at(start, module.weight_int8.data)
    assert torch.equal(module(starting_at(start, x)), expected)


def test_sums_of_codes_stay_within_float16() -> None:
    dense = nn.Linear(600, 3, bias=False)
    dense.weight.data.fill_(0.01)
    result = filled(dense)(torch.full((1, 600), 8.0, dtype=torch.float16))
    assert result.sub(48).abs().max() < 0.5


def test_gradients_reach_the_input_but_no_stored_tensor() -> None:
    module = head()
    x = torch.randn(3, 20, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, module.decode().sum(0).expand(3, -1), rtol=1e-5, atol=1e-6)
    assert module.weight_int8.grad is None


def test_embedding_of_a_subclass_keeps_its_scaling() -> None:
    torch.manual_seed(0)
    dense = Gemma3TextScaledWordEmbedding(30, 20, 0, embed_scale=4.5)
    module = filled(copy.deepcopy(dense))
    assert isinstance(module, Int8Embedding)
    assert isinstance(module, Gemma3TextScaledWordEmbedding)
    dense.weight.data = module.decode()
    assert torch.equal(module(IDS), dense(IDS))
    assert type(filled(copy.deepcopy(dense))) is type(module)
    assert torch.equal(module.bfloat16()(IDS), dense.bfloat16()(IDS))


class OwnPatches(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.weight.mean()


class OwnLookup(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T


def test_only_modules_of_known_behaviour_can_hold_a_table() -> None:
    for module in (nn.Embedding(3, 4), Gemma3TextScaledWordEmbedding(3, 4, 0), nn.Linear(3, 4), nn.Conv2d(3, 4, 2)):
        assert can_hold_table(module)
    for other in (
        OwnLookup(3, 4),
        OwnPatches(3, 4, 2),
        nn.Embedding(3, 4, max_norm=1.0),
        nn.Conv1d(3, 4, 1),
        nn.Identity(),
        None,
    ):
        assert not can_hold_table(other)


@pytest.mark.parametrize("make", [embedding, head, patches])
@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.float16),
                                  lambda m: m.type(torch.float16)])  # fmt: skip
def test_dtype_moves_leave_stored_tensors_alone(
    make: Callable[[], Int8Table], move: Callable[[nn.Module], Int8Table]
) -> None:
    module = make()
    # This scale overflows in float16.
    module.weight_int8_scale[3] = 2.0**20
    before = module.decode()
    moved = move(module)
    assert torch.equal(moved.decode(), before)
    assert (moved.weight_int8.dtype, moved.weight_int8_scale.dtype) == (torch.int8, torch.bfloat16)
    assert moved.weight.dtype != torch.float32
    if isinstance(moved, (nn.Linear, nn.Conv2d)):
        assert bias_of(moved).dtype == moved.weight.dtype


def test_stand_in_weight_has_shape_dtype_and_device() -> None:
    module = hold_table(nn.Embedding(30, 20, device="meta"), TableLayout((30, 20)), torch.bfloat16)
    assert (module.weight.shape, module.weight.dtype, module.weight.device.type) == ((30, 20), torch.bfloat16, "meta")
    assert embedding().weight.isnan().all()
    assert head().state_dict().keys() == {"weight_int8", "weight_int8_scale", "bias"}
    assert dict(head().named_parameters()).keys() == {"weight_int8", "bias"}


def test_shared_table_is_saved_once() -> None:
    module, tied = embedding(), hold_table(nn.Linear(20, 30), TableLayout((30, 20)))
    assert isinstance(tied, Int8Table)
    tied.connect(module)
    assert tied.weight_int8 is module.weight_int8
    assert tied.weight_int8_scale is module.weight_int8_scale
    x = torch.randn(4, 20)
    assert torch.allclose(tied(x), functional.linear(x, module.decode(), bias_of(tied)), rtol=1e-5, atol=1e-5)
    assert tied.state_dict().keys() == {"weight_int8", "bias"}
    first, second = copy.deepcopy(nn.ModuleList([module, tied])).half()
    assert isinstance(first, Int8Table)
    assert isinstance(second, Int8Table)
    assert first.weight_int8 is second.weight_int8
    assert torch.equal(second.decode(), module.decode())


def table_kind(module: Table) -> type[Table]:
    return next(kind for kind in (Int8Embedding, Int8Linear, Int8Conv2d) if isinstance(module, kind))


@pytest.mark.parametrize(
    "make", [embedding, head, patches, lambda: filled(Gemma3TextScaledWordEmbedding(30, 20, 0, 2.0))]
)
def test_copies_and_pickles_compute_the_same(make: Callable[[], Table]) -> None:
    module = make()
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for other in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
        assert type(other) is type(module)
        assert torch.equal(other.decode(), module.decode())
        x = {Int8Linear: torch.ones(2, 20), Int8Conv2d: torch.ones(2, 3, 4, 2)}.get(table_kind(module), IDS)
        assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(
    "make", [embedding, head, patches, lambda: filled(Gemma3TextScaledWordEmbedding(30, 20, 0, 2.0))]
)
def test_dropped_table_becomes_the_dense_module_again(make: Callable[[], Table]) -> None:
    module = make()
    dense_class, decoded = module.dense_class, module.decode()
    untouched = {key for key in vars(copy.deepcopy(module)) if not key.startswith("_")}
    drop_table(module, nn.Parameter(decoded))
    assert type(module) is dense_class
    assert {key for key in vars(module) if not key.startswith("_")} == untouched
    assert torch.equal(module.weight, decoded)
    assert "weight_int8" not in module.state_dict()
    assert "weight_int8_scale" not in module.state_dict()


PLANES = matrix_format(4, offset=True, rotation="hadamard", outlier_columns=0.05)
TRELLIS = matrix_format(3, "all", primitive="trellis1")


def in_planes(module: nn.Embedding | nn.Linear | nn.Conv2d, form: MatrixFormat = PLANES) -> PackedTable:
    """The module over random planes, prepared for the kernels."""
    layout = TableLayout(tuple(module.weight.shape), form)
    assert layout.packed is not None
    weight = random_weight(layout.packed)
    table = hold_table(module, layout)
    assert isinstance(table, PackedTable)
    for suffix, tensor in weight.tensors.items():
        table.get_parameter(suffix).data = tensor
    assert torch.equal(table.decode(), weight.decode().view(layout.shape))
    table.prepare()
    return table


@pytest.mark.parametrize("form", [PLANES, TRELLIS], ids=["planes", "trellis"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS.int(), IDS[0, 1]], ids=lambda ids: f"{list(ids.shape)} {ids.dtype}")
def test_rows_of_planes_are_looked_up(form: MatrixFormat, dtype: torch.dtype, ids: Tensor) -> None:
    module = in_planes(nn.Embedding(30, 20), form).to(dtype)
    result = module(ids)
    assert result.dtype == dtype
    expected = functional.embedding(ids, module.decode()).to(dtype)
    # A rotation sums in an order that depends on the number of rows.
    torch.testing.assert_close(result, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    module.restore()
    torch.testing.assert_close(module(ids), result, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("wrong", [-1, 30])
def test_ids_outside_the_planes_are_refused(wrong: int, prepared: bool) -> None:
    module = in_planes(nn.Embedding(30, 20))
    if not prepared:
        module.restore()
    with pytest.raises(IndexError, match="no such row"):
        module(torch.tensor([0, wrong]))


def test_scaled_embedding_over_planes_keeps_its_scaling() -> None:
    dense = Gemma3TextScaledWordEmbedding(30, 20, 0, embed_scale=4.5)
    module = in_planes(copy.deepcopy(dense))
    assert isinstance(module, Gemma3TextScaledWordEmbedding)
    dense.weight.data = module.decode()
    torch.testing.assert_close(module(IDS), dense(IDS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_head_of_planes_is_the_dense_product(bias: bool) -> None:
    module = in_planes(nn.Linear(20, 30, bias=bias))
    assert isinstance(module, nn.Linear)
    x = torch.randn(2, 3, 20)
    expected = functional.linear(x, module.decode(), bias_of(module) if bias else None)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_patches_in_planes_match_the_convolution() -> None:
    module = in_planes(nn.Conv2d(3, 10, (4, 2), stride=(4, 2)))
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(module(images), functional.conv2d(images, module.decode(), bias_of(module), stride=(4, 2)))


def test_tied_planes_are_in_memory_once() -> None:
    module, tied = in_planes(nn.Embedding(30, 20)), in_planes(nn.Linear(20, 30, bias=False))
    module.tie(tied)
    module.tie(tied)
    module.prepare()
    decoded, x = module.decode(), torch.randn(4, 20)
    for one, other in ((module, tied), copy.deepcopy(nn.ModuleList([module, tied])).half()):
        assert isinstance(one, PackedTable)
        assert isinstance(other, PackedTable)
        assert one.words is other.words
        assert one.get_parameter("weight_codes") is other.get_parameter("weight_codes")
        assert torch.equal(one.decode(), decoded)
        assert torch.equal(other.state_dict()["weight_codes"], one.state_dict()["weight_codes"])
    torch.testing.assert_close(tied(x), x @ decoded.T, rtol=1e-4, atol=1e-4)
    drop_table(module, nn.Parameter(decoded))
    torch.testing.assert_close(tied(x), x @ decoded.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Embedding(30, 20), IDS),
        (lambda: nn.Linear(20, 30), torch.ones(2, 20)),
        (lambda: nn.Conv2d(3, 10, (4, 2)), torch.ones(2, 3, 4, 2)),
        (lambda: Gemma3TextScaledWordEmbedding(30, 20, 0, 2.0), IDS),
    ],
)
def test_tables_of_planes_are_copied_pickled_and_dropped(make: Callable[[], Any], x: Tensor) -> None:
    module = in_planes(make())
    expected, stream = module(x), io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for other in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
        assert type(other) is type(module)
        assert torch.equal(other(x), expected)
    decoded, attributes = module.decode(), vars(make()).keys()
    drop_table(module, nn.Parameter(decoded))
    assert type(module) is type(make())
    assert vars(module).keys() == attributes
    assert module.state_dict().keys() == make().state_dict().keys()
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
