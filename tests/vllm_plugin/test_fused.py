from __future__ import annotations

from typing import Any

import pytest
import torch
from artifacts import random_matrix
from compiled import needs_kernels
from torch import Tensor, nn

from shiftadd_cli.bcq.weight import QuantizedWeight
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.kernels.select import Kernel
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.vllm_plugin.fused import FusedLinear
from shiftadd_cli.vllm_plugin.loading import close_gates, open_gates

SHARDS = ("q", "k", "v")
ROWS = (24, 8, 8)


def qkv(bits: tuple[int, ...] = (3, 3, 3), **changes: Any) -> dict[str, QuantizedWeight]:
    return {
        f"a.{shard}_proj": random_matrix(rows, seed, rotation="hadamard", bits=width, **changes)
        for seed, (shard, rows, width) in enumerate(zip(SHARDS, ROWS, bits, strict=True))
    }


def loaded(weights: dict[str, QuantizedWeight], dtype: torch.dtype = torch.float32) -> FusedLinear:
    layer = FusedLinear({name: weight.layout for name, weight in weights.items()}, dtype)
    for shard, weight in zip(SHARDS, weights.values(), strict=True):
        for suffix, tensor in weight.tensors.items():
            layer.load(suffix, tensor, shard)
    layer.finish()
    return layer


def side_by_side(weights: dict[str, QuantizedWeight], x: Tensor) -> Tensor:
    """The outputs of the parts, computed one by one as in transformers."""
    layers = [PackedLinear.from_weight(weight) for weight in weights.values()]
    for layer in layers:
        layer.prepare()
    return torch.cat([layer(x) for layer in layers], dim=-1)


@pytest.fixture(params=["auto", "reference", "triton"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("SHIFTADD_KERNEL", request.param)
    return str(request.param)


@pytest.mark.parametrize(("bits", "calls"), [((3, 3, 3), 1), ((3, 3, 2), 2), ((4, 2, 3), 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_that_of_the_parts_side_by_side(
    kernel: str, bits: tuple[int, ...], calls: int, dtype: torch.dtype
) -> None:
    weights, x = qkv(bits), torch.randn(3, 36, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = loaded(weights, dtype)
    assert len(layer.parts) == calls
    output, expected = layer(x), side_by_side(weights, x)
    assert output.dtype == dtype
    # Every row is the same sum, but torch may compute products of other heights in another way.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@needs_kernels
def test_joining_changes_no_bit_with_look_up_tables() -> None:
    weights, x = qkv(), torch.randn(5, 36)
    layer = loaded(weights)
    (only,) = layer.parts
    assert isinstance(only, PackedLinear)
    assert only.kernel is Kernel.CPU
    assert torch.equal(layer(x), side_by_side(weights, x))


def test_outlier_columns_and_a_bias_are_added() -> None:
    weights, x, bias = qkv(outlier_columns=0.1), torch.randn(2, 36), torch.randn(40)
    expected = torch.cat([x @ weight.decode().T for weight in weights.values()], -1) + bias
    torch.testing.assert_close(loaded(weights)(x, bias), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [(3, 3, 3), (3, 2, 2)])
def test_layer_compiles_into_one_graph(kernel: str, bits: tuple[int, ...]) -> None:
    layer, x = loaded(qkv(bits)), torch.randn(3, 36)
    with torch.inference_mode():
        compiled = torch.compile(lambda y: layer(y), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x))


def test_layer_has_a_parameter_per_stored_tensor_until_it_is_loaded() -> None:
    weights, layer = qkv((3, 3, 2)), nn.Module()
    layer.compressed = FusedLinear({name: weight.layout for name, weight in weights.items()})
    open_gates(layer, layer.compressed)
    gates = dict(layer.named_parameters(recurse=False))
    assert set(gates) == {"weight_codes", "weight_exponents", "weight_row_scale", "weight_signs"}
    for shard, weight in zip(SHARDS, weights.values(), strict=True):
        for suffix, tensor in weight.tensors.items():
            gate: Any = gates[suffix]
            assert gate.dtype == tensor.dtype
            gate.weight_loader(gate, tensor, shard)
    close_gates(layer, layer.compressed)
    assert not dict(layer.named_parameters(recurse=False))
    layer.compressed.finish()
    x = torch.randn(1, 36)
    torch.testing.assert_close(layer.compressed(x), side_by_side(weights, x), rtol=1e-5, atol=1e-5)


def test_layer_of_one_part_loads_without_a_shard() -> None:
    weight = random_matrix(8, 0)
    layer = FusedLinear({"a.o_proj": weight.layout}, torch.float32)
    for suffix, tensor in weight.tensors.items():
        layer.load(suffix, tensor)
    layer.finish()
    layer.finish()
    x = torch.randn(2, 36)
    torch.testing.assert_close(layer(x), x @ weight.decode().T, rtol=1e-4, atol=1e-4)


def test_missing_tensor_is_named() -> None:
    weights = qkv()
    layer = FusedLinear({name: weight.layout for name, weight in weights.items()})
    for shard, weight in zip(SHARDS, weights.values(), strict=True):
        for suffix, tensor in weight.tensors.items():
            if (shard, suffix) != ("k", "weight_exponents"):
                layer.load(suffix, tensor, shard)
    with pytest.raises(ArtifactError, match=r"^The checkpoint lacks the tensor a.k_proj.weight_exponents; "):
        layer.finish()


def test_mismatched_tensors_are_named() -> None:
    layer = FusedLinear({name: weight.layout for name, weight in qkv().items()})
    for suffix, tensor, sentence in (
        (
            "weight_codes",
            torch.zeros(8, 2, 5, dtype=torch.uint8),
            r"^a.k_proj.weight_codes has shape \[8, 2, 5\], .*\[8",
        ),
        ("weight_row_scale", torch.zeros(8), r"^a.k_proj.weight_row_scale is torch.float32, and the format says"),
        ("weight_offset", torch.zeros(8, 2), r"^The checkpoint holds a.k_proj.weight_offset, which its config.json"),
    ):
        with pytest.raises(ArtifactError, match=sentence):
            layer.load(suffix, tensor, "k")


def test_values_that_are_not_finite_are_refused() -> None:
    weights = qkv()
    weights["a.v_proj"].tensors["weight_row_scale"][3] = torch.inf
    with pytest.raises(ArtifactError, match=r"^a.v_proj.weight_row_scale holds values that are not finite"):
        loaded(weights)
