"""Kinds of layers, the copies that calls cycle through, and the figures computed from the times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifacts import COMMON, random_weight, write_checkpoint
from benchmark_clocks import ticking
from formats import matrix_format
from loading import load
from tiny_models import tiny_model
from transformers import PreTrainedModel

from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.benchmark import layer_speed as module
from shiftadd_cli.benchmark.layer_speed import Layer, WaySpeed, copies_for, layer_kinds, measure_layers
from shiftadd_cli.benchmark.roof import Roof
from shiftadd_cli.benchmark.timing import Clock, Span, Timed
from shiftadd_cli.kernels.select import Kernel
from shiftadd_cli.runtime.linear import PackedLinear

TWO_BITS = COMMON.replaced(bits=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = tmp_path_factory.mktemp("models") / "packed"
    return load(write_checkpoint(tiny_model("llama"), folder, own={"up_proj": TWO_BITS}, tables=True).folder)


def test_layers_of_one_shape_and_layout_are_one_kind(model: PreTrainedModel) -> None:
    kinds = layer_kinds(model)
    kind_of = {"/".join(name.rpartition(".")[2] for name in kind.names): kind for kind in kinds}
    assert list(kind_of) == ["q_proj/o_proj", "k_proj/v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    assert kind_of["q_proj/o_proj"].names[0] == "model.layers.*.self_attn.q_proj"
    assert [len(kind.modules) for kind in kinds] == [4, 4, 2, 2, 2, 1]
    assert (kind_of["up_proj"].out_features, kind_of["up_proj"].in_features) == (100, 48)
    assert kind_of["up_proj"].form == "2 bits, apot2, 1 x 16"
    assert kind_of["up_proj"].stored_bytes == kind_of["up_proj"].modules[0].layout.nbytes
    assert (kind_of["lm_head"].form, kind_of["lm_head"].stored_bytes) == ("8-bit rows", 320 * 48 + 2 * 320)


def test_an_original_has_no_compressed_layers() -> None:
    assert layer_kinds(tiny_model("llama")) == []


def test_the_form_lists_the_parts_of_the_format() -> None:
    form = matrix_format(4, "all", 1, "float", True, offset=True, rotation="hadamard", outlier_columns=0.25)
    layer = PackedLinear.from_weight(random_weight(PackedLayout(form, 8, 16)))
    assert layer_kinds(layer)[0].form == "4 bits, float, 1 x 16, rotated, offsets, 4 outliers"
    shift = form.replaced(primitive="shift2", outlier_columns=0.0)
    layer = PackedLinear.from_weight(random_weight(PackedLayout(shift, 8, 16)))
    assert layer_kinds(layer)[0].form == "4 bits, shift2, row scales, rotated"


@pytest.mark.parametrize(
    ("nbytes", "cache", "most", "expected"),
    [(1000, 10_000, 10**9, 20), (999, 10_000, 10**9, 21), (1000, 10_000, 5000, 5), (10**6, 10, 100, 1)],
)
def test_copies_fill_twice_the_cache_within_memory(nbytes: int, cache: int, most: int, expected: int) -> None:
    assert copies_for(nbytes, cache, most) == expected


def test_tiny_layers_have_a_limited_number_of_copies() -> None:
    assert copies_for(1, 1 << 30, 1 << 40) == module._MOST_COPIES


def test_calls_cycle_through_all_copies_across_samples() -> None:
    called: list[int] = []

    def numbered(number: int) -> Layer:
        def layer(x: torch.Tensor) -> torch.Tensor:
            called.append(number)
            return x

        return layer

    ring = module.Ring([numbered(number) for number in range(3)], 10, cold=True, dtype=torch.float32)
    x = torch.ones(1, 2)
    # One call of each copy, then three calls of a third of a second each.
    assert ring.calls_for(x, ticking()) == 1
    assert called == [0, 1, 2, 0, 1, 2]
    called.clear()
    assert ring.sample(x, 4, ticking(cores=2)) == Span(0.25, 0.5)
    assert ring.sample(x, 2, ticking()) == Span(0.5, 0.5)
    assert called == [0, 1, 2, 0, 1, 2]


def test_the_models_own_layers_come_first_and_copies_have_their_own_memory(model: PreTrainedModel) -> None:
    kind = layer_kinds(model)[0]
    layers = module._compressed_copies(kind, 6)
    assert all(one is two for one, two in zip(layers, kind.modules, strict=False))
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    stored = [layer.words if layer.kernel is Kernel.CPU else layer.get_parameter("weight_codes") for layer in packed]
    addresses = {tensor.data_ptr() for tensor in stored}
    assert len(layers) == len(packed) == len(addresses) == 6
    x = torch.randn(2, kind.in_features)
    assert torch.equal(layers[5](x), kind.modules[0](x))
    assert len(module._compressed_copies(kind, 2)) == 2


def test_all_kinds_are_measured_together_with_dense_layers(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_COPIES", 3)
    kinds = layer_kinds(model)
    speeds = measure_layers(
        kinds, torch.bfloat16, rounds=2, cache_bytes=20_000, free_bytes=1 << 30, clock=ticking(), show_progress=False
    )
    assert [speed.kind for speed in speeds] == kinds
    for speed in speeds:
        assert speed.dtype == "bfloat16"
        assert [way.name for way in speed.dense] == ["float32", "bfloat16"]
        weights = speed.kind.out_features * speed.kind.in_features
        assert [way.weight_bytes for way in (speed.compressed, *speed.dense)] == [
            speed.kind.stored_bytes,
            4 * weights,
            2 * weights,
        ]
        for way in (speed.compressed, *speed.dense):
            assert {rows: timed.spans for rows, timed in way.calls.items()} == {
                1: (Span(1.0, 1.0),) * 2,
                64: (Span(1.0, 1.0),) * 2,
            }
            assert way.cold == (way.copies * way.weight_bytes > 20_000)
    assert [speed.compressed.cold for speed in speeds] == [False] * 5 + [True]
    assert [speed.dense[0].cold for speed in speeds] == [True, False, True, True, True, True]


def test_dense_layers_compute_the_same_as_the_compressed_one(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: dict[str, torch.Tensor] = {}
    sample = module.Ring.sample

    def record(self: module.Ring, x: torch.Tensor, calls: int, clock: Clock) -> Span:
        if x.dtype == torch.float32 and len(x) == 64:
            outputs[str(self.nbytes)] = self.layers[0](x)
        return sample(self, x, calls, clock)

    monkeypatch.setattr(module.Ring, "sample", record)
    monkeypatch.setattr(module, "_MOST_COPIES", 2)
    measure_layers(
        layer_kinds(model)[:1],
        torch.float32,
        rounds=1,
        cache_bytes=1,
        free_bytes=1 << 30,
        clock=ticking(),
        show_progress=False,
    )
    one, two = outputs.values()
    assert torch.allclose(one, two, atol=1e-4)


def test_roof_shares_exist_only_for_weights_outside_the_cache() -> None:
    calls = {1: Timed((Span(0.002, 0.002), Span(0.004, 0.004), Span(0.001, 0.001)))}
    roof = Roof(10e9, "sum", 1)
    assert WaySpeed("compressed", 5_000_000, 10, True, calls).roof_share(roof, 1) == pytest.approx(0.25)
    assert WaySpeed("compressed", 5_000_000, 1, False, calls).roof_share(roof, 1) is None


def test_measuring_does_not_change_the_model(model: PreTrainedModel, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measure_layers(
        layer_kinds(model)[:1],
        torch.float32,
        rounds=1,
        cache_bytes=1,
        free_bytes=1 << 30,
        clock=ticking(),
        show_progress=False,
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
