"""The CPU kernels in every instruction set of this machine, compared with float64 products of the decoded matrix."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from artifacts import random_weight
from compiled import needs_kernels, on_threads, supported_layouts
from formats import layout_on
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shiftadd_cli.bcq.grid import ScaleGrid
from shiftadd_cli.bcq.rotation import random_signs, rotate_input
from shiftadd_cli.bcq.weight import PackedLayout, QuantizedWeight
from shiftadd_cli.kernels import ops
from shiftadd_cli.kernels.cpu_weight import CpuWeight
from shiftadd_cli.native.extension import instruction_sets

pytestmark = needs_kernels

LAYOUT = layout_on(ScaleGrid.resolve(150, 320, 1, 128), 3, "apot2", True, False)
EPS = torch.finfo(torch.float32).eps


def run(
    x: Tensor,
    weight: QuantizedWeight,
    *,
    bias: Tensor | None = None,
    fast: bool = False,
    method: str = "auto",
    kernels: str = "",
) -> Tensor:
    stored: dict[str, Any] = CpuWeight.pack(weight).tensors()
    return ops.lookup_linear(
        x,
        **stored,
        bias=bias,
        group_columns=weight.layout.grid.group_columns,
        bits=weight.layout.bits,
        planes=weight.layout.planes,
        fast=fast,
        method=method,
        kernels=kernels,
    )


def exact_product(x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """x (W R)ᵀ in float64, and the sum of the absolute values of its terms in the basis of the planes."""
    signs = weight.signs()
    rotated = x.double() if signs is None else rotate_input(x.double(), signs.double())
    decoded = weight.decode_stored().double()
    # Terms belong to single planes, and may cancel in a weight.
    layout = weight.layout
    ratios = layout.grid.expand_columns(layout.grid.expand_rows(weight.ratios()).sum(-1))
    offsets = weight.offsets(weight.ratios())
    if offsets is not None:
        ratios = ratios + layout.grid.expand_columns(layout.grid.expand_rows(offsets)).abs()
    sizes = ratios.double() * weight.tensors["weight_row_scale"].double().view(-1, 1)
    order = layout.grid.columns & -layout.grid.columns
    spread = rotated.abs() if signs is None else (x.double().abs().amax(-1, keepdim=True) * order).expand_as(x)
    return rotated @ decoded.T, spread @ sizes.abs().T


@pytest.mark.parametrize("kernels", instruction_sets())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(supported_layouts(), st.integers(1, 40), st.sampled_from(["look-up", "multiply"]), st.integers(0, 2**31))
def test_float32_is_exact_to_rounding(kernels: str, layout: PackedLayout, batch: int, method: str, seed: int) -> None:
    weight = random_weight(layout, seed)
    x = torch.randn(batch, layout.grid.columns, generator=torch.Generator().manual_seed(seed))
    expected, sizes = exact_product(x, weight)
    result = run(x, weight, method=method, kernels=kernels)
    assert result.dtype == torch.float32
    assert ((result.double() - expected).abs() <= 16 * EPS * sizes).all()


@pytest.mark.parametrize("kernels", instruction_sets())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(supported_layouts(), st.integers(1, 70), st.integers(0, 2**31))
def test_bfloat16_multiplication_rounds_weights_and_output(
    kernels: str, layout: PackedLayout, batch: int, seed: int
) -> None:
    weight = random_weight(layout, seed)
    x = torch.randn(batch, layout.grid.columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    bias = torch.randn(layout.grid.rows, generator=torch.Generator().manual_seed(seed + 1))
    expected, sizes = exact_product(x, weight)
    result = run(x, weight, bias=bias, fast=True, method="multiply", kernels=kernels)
    assert result.dtype == torch.bfloat16
    # Rounding of rotated activations, of weights, and of the output.
    eps = torch.finfo(torch.bfloat16).eps
    expected = expected + bias
    assert ((result.double() - expected).abs() <= eps * sizes + eps / 2 * expected.abs()).all()


@pytest.mark.parametrize("kernels", instruction_sets())
@pytest.mark.parametrize("batch", [20, 31, 1050])
@pytest.mark.parametrize("columns", [48, 320, 1088])
def test_a_row_that_is_not_finite_leaves_the_others_alone(kernels: str, batch: int, columns: int) -> None:
    weight = random_weight(layout_on(ScaleGrid.resolve(70, columns, 1, columns), 3, "apot2", True, False))
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    sound = run(x, weight, fast=True, method="multiply", kernels=kernels)
    x[7] = torch.inf
    result = run(x, weight, fast=True, method="multiply", kernels=kernels)
    others = torch.arange(batch) != 7
    assert torch.equal(result[others], sound[others])
    assert not result[7].isfinite().any()


@pytest.mark.parametrize("kernels", instruction_sets())
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("outlier", [1, 30, 1000])
def test_sixteen_bit_tables_lose_less_than_bfloat16(kernels: str, bits: int, outlier: float) -> None:
    weight = random_weight(layout_on(ScaleGrid.resolve(96, 512, 1, 128), bits, "apot2", True, False))
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(bits))
    x[:, ::97] *= outlier
    expected, _ = exact_product(x, weight)
    error = (run(x, weight, fast=True, method="look-up", kernels=kernels).double() - expected).norm()
    rounded = (x.bfloat16().double() - x.double()) @ weight.decode_stored().double().T
    assert error < rounded.norm()


@pytest.mark.parametrize("kernels", instruction_sets())
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 64])
def test_half_precision_rounds_once(kernels: str, fast: bool, dtype: torch.dtype, batch: int) -> None:
    weight = random_weight(LAYOUT)
    x = torch.randn(batch, 320, generator=torch.Generator().manual_seed(3)).to(dtype)
    result = run(x, weight, fast=fast, kernels=kernels)
    expected, _ = exact_product(x, weight)
    assert result.dtype == dtype
    error = (result.double() - expected).norm() / expected.norm()
    # Products of bfloat16 numbers round the decoded weights as well.
    assert error < torch.finfo(dtype).eps * (0.5 if not fast else 1.0) + (1e-3 if fast else 0)


@pytest.mark.parametrize("kernels", instruction_sets())
@pytest.mark.parametrize("fast", [False, True])
def test_zeros_and_denormals_leave_only_the_bias(kernels: str, fast: bool) -> None:
    weight = random_weight(LAYOUT)
    bias = torch.arange(150.0)
    x = torch.zeros(2, 320)
    x[1] = 1e-40
    result = run(x, weight, bias=bias, fast=fast, kernels=kernels)
    assert torch.equal(result[0], bias)
    torch.testing.assert_close(result[1], bias)


@pytest.mark.parametrize("kernels", instruction_sets())
def test_shapes_are_those_of_a_linear_layer(kernels: str) -> None:
    weight = random_weight(LAYOUT)
    x = torch.randn(2, 3, 320)
    assert run(x[0, 0], weight, kernels=kernels).shape == (150,)
    assert run(x[:, :0], weight, kernels=kernels).shape == (2, 0, 150)
    assert torch.equal(run(x, weight, kernels=kernels)[1, 2], run(x[1, 2], weight, kernels=kernels))
    turned = x.transpose(0, 1)
    assert torch.equal(run(turned, weight, kernels=kernels), run(turned.contiguous(), weight, kernels=kernels))


@pytest.mark.parametrize("method", ["look-up", "multiply"])
@pytest.mark.parametrize("fast", [False, True])
def test_threads_change_no_bit(method: str, fast: bool) -> None:
    weight = random_weight(layout_on(ScaleGrid.resolve(700, 1024, 1, 128), 3, "apot2", True, True, True))
    x = torch.randn(20, 1024).bfloat16()
    results = on_threads(range(1, 5), lambda: run(x, weight, fast=fast, method=method))
    assert all(torch.equal(result, results[0]) for result in results)


def test_concurrent_calls_do_not_interfere() -> None:
    weight = random_weight(layout_on(ScaleGrid.resolve(700, 1024, 1, 128), 3, "apot2", True, False))
    inputs = [torch.randn(1 + 9 * index, 1024) for index in range(4)]
    alone = [run(x, weight) for x in inputs]
    wrong: list[int] = []

    def repeat(index: int) -> None:
        for _ in range(30):
            if not torch.equal(run(inputs[index], weight), alone[index]):
                wrong.append(index)

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40) | st.sampled_from([64, 96, 576, 1024, 1536]), st.integers(1, 5))
def test_rotate_is_the_reference(columns: int, batch: int) -> None:
    x, signs = torch.randn(batch, columns), random_signs(columns, seed=columns)
    expected = rotate_input(x.double(), signs.double())
    torch.testing.assert_close(ops.rotate(x, signs).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ops.rotate(x.bfloat16(), signs), ops.rotate(x.bfloat16().float(), signs).bfloat16())


def arguments(x: Tensor) -> dict[str, Any]:
    weight = random_weight(layout_on(ScaleGrid.resolve(40, 64, 1, 32), 2, "apot2", True, True, True))
    return {
        "x": x,
        **CpuWeight.pack(weight).tensors(),
        "bias": torch.ones(40),
        "group_columns": 32,
        "bits": 2,
        "planes": 2,
        "fast": False,
        "method": "auto",
        "kernels": "",
    }


def test_operators_pass_the_checks_of_torch() -> None:
    fields = arguments(torch.randn(3, 64))
    torch.library.opcheck(torch.ops.shiftadd.lookup_linear.default, (), fields)
    torch.library.opcheck(torch.ops.shiftadd.rotate.default, (torch.randn(3, 64), fields["signs"]))
    codes = torch.randint(-127, 128, (30, 64), dtype=torch.int8)
    torch.library.opcheck(torch.ops.shiftadd.codes_linear.default, (torch.randn(3, 64), codes, torch.rand(30)))


def test_operator_compiles_into_one_graph() -> None:
    fields = arguments(torch.randn(3, 64))

    def step(x: Tensor) -> Tensor:
        return ops.lookup_linear(**{**fields, "x": x * 2}) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(fields["x"]), step(fields["x"]))


def test_meta_tensors_get_shapes() -> None:
    on_meta: dict[str, Any] = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in arguments(torch.randn(2, 5, 64)).items()
    }
    result = ops.lookup_linear(**on_meta)
    assert (result.shape, result.device.type) == ((2, 5, 40), "meta")


def test_backward_pass_is_refused() -> None:
    result = ops.lookup_linear(**arguments(torch.randn(3, 64, requires_grad=True)))
    with pytest.raises(RuntimeError, match="no gradient; load the model with SHIFTADD_KERNEL=reference"):
        result.sum().backward()


@pytest.mark.parametrize(
    "change",
    [{"words": torch.zeros(5, dtype=torch.int32)}, {"x": torch.randn(3, 60)}, {"bits": 3}, {"planes": 3},
     {"bits": 1}, {"scale_codes": None}, {"scale_codes": torch.zeros(3, dtype=torch.uint8)},
     {"offsets": torch.zeros(1)}, {"signs": torch.ones(3)}, {"bias": torch.ones(3)},
     {"signs": torch.ones(64).bfloat16()}, {"row_scale": torch.ones(40).bfloat16()},
     {"row_scale": torch.ones(80)[::2]}, {"offsets": torch.ones(2, 2, 32).half()}],
)  # fmt: skip
def test_mismatched_tensors_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"do not fit|incompatible|one number a column|no trellis code"):
        ops.lookup_linear(**{**arguments(torch.randn(3, 64)), **change})


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        ops.lookup_linear(**arguments(torch.randn(3, 64, dtype=torch.float64)))


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="no such kernels"):
        ops.lookup_linear(**{**arguments(torch.randn(3, 64)), "kernels": "mmx"})


def test_only_plain_tensors_bypass_torch() -> None:
    x = torch.randn(3, 8)
    assert not ops.is_plain(x), "gradients may be wanted"
    with torch.no_grad():
        assert ops.is_plain(x)
        assert not ops.is_plain(x.to("meta"))
        assert not ops.is_plain(nn.Parameter(x))
        with FlopCounterMode(display=False):
            assert not ops.is_plain(x)
        assert torch.func.vmap(lambda row: row + ops.is_plain(row))(x).equal(x)
        assert torch.compile(lambda y: y + ops.is_plain(y), backend="eager", fullgraph=True)(x).equal(x)
    with torch.inference_mode():
        assert ops.is_plain(x)


@pytest.mark.parametrize("rotated", [False, True])
def test_direct_and_dispatched_calls_give_the_same_bits(rotated: bool) -> None:
    fields = arguments(torch.randn(3, 64))
    fields["signs"] = fields["signs"] if rotated else None
    with torch.no_grad():
        assert torch.equal(ops.lookup_linear(**fields), torch.ops.shiftadd.lookup_linear.default(**fields))


def gathered(numbers: Tensor, weight: QuantizedWeight) -> Tensor:
    return ops.gather_rows(numbers, CpuWeight.pack(weight), weight.layout)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(supported_layouts(), st.integers(0, 99), st.data())
def test_gathered_rows_have_the_bits_of_the_reference(layout: PackedLayout, seed: int, data: st.DataObject) -> None:
    weight = random_weight(layout, seed)
    numbers = data.draw(st.lists(st.integers(0, layout.rows - 1), max_size=9))
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
    ids = torch.tensor(numbers, dtype=dtype).view(data.draw(st.sampled_from([(len(numbers),), (1, len(numbers), 1)])))
    result = gathered(ids, weight)
    assert result.dtype == torch.float32
    assert torch.equal(result, weight.decode_stored()[ids.long()])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rows_of_every_stripe_are_gathered(bits: int) -> None:
    form = LAYOUT.format.replaced(primitive="trellis1", bits=bits, group_size="all")
    weight = random_weight(PackedLayout(form, 700, 48))
    expected, backwards = weight.decode_stored(), torch.arange(700).flip(0)
    for result in on_threads((1, 2), lambda: gathered(backwards, weight)):
        assert torch.equal(result, expected.flip(0))


@pytest.mark.parametrize("wrong", [-1, 150])
def test_rows_that_are_not_there_are_refused(wrong: int) -> None:
    with pytest.raises(IndexError, match="no such row"):
        gathered(torch.tensor([0, wrong]), random_weight(LAYOUT))


def test_gathering_compiles_into_one_graph() -> None:
    weight = random_weight(LAYOUT)
    packed, ids = CpuWeight.pack(weight), torch.tensor([[3, 149], [0, 3]])

    def step(numbers: Tensor) -> Tensor:
        return 2 * ops.gather_rows(numbers, packed, LAYOUT)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), 2 * weight.decode_stored()[ids])
