"""Kinds of layers, the copies their calls go through, and what follows from the times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifacts import COMMON, random_weight, write_checkpoint
from benchmark_clocks import ticking
from formats import matrix_format
from loading import load
from tiny_models import tiny_model

from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.benchmark import layer_speed as module
from shiftadd_cli.benchmark.layer_speed import WaySpeed, copies_for, layer_kinds, measure_layers
from shiftadd_cli.benchmark.roof import Roof
from shiftadd_cli.benchmark.timing import Span, Timed
from shiftadd_cli.kernels.select import Kernel
from shiftadd_cli.runtime.linear import PackedLinear

TWO_BITS = COMMON.replaced(bits=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("models") / "packed"
    return load(write_checkpoint(tiny_model("llama"), folder, own={"up_proj": TWO_BITS}, tables=True).folder)


def test_layers_are_alike_where_shape_and_layout_are(model):
    kinds = layer_kinds(model)
    found = {"/".join(name.rpartition(".")[2] for name in kind.names): kind for kind in kinds}
    assert list(found) == ["q_proj/o_proj", "k_proj/v_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    assert found["q_proj/o_proj"].names[0] == "model.layers.*.self_attn.q_proj"
    assert [len(kind.modules) for kind in kinds] == [4, 4, 2, 2, 2, 1]
    assert (found["up_proj"].out_features, found["up_proj"].in_features) == (100, 48)
    assert found["up_proj"].form == "2 bits, apot2, 1 x 16"
    assert found["up_proj"].stored_bytes == found["up_proj"].modules[0].layout.nbytes
    assert (found["lm_head"].form, found["lm_head"].stored_bytes) == ("8-bit rows", 320 * 48 + 2 * 320)


def test_an_original_has_no_compressed_layers():
    assert layer_kinds(tiny_model("llama")) == []


def test_the_form_names_what_is_there():
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
def test_copies_exceed_the_cache_twice_within_memory(nbytes, cache, most, expected):
    assert copies_for(nbytes, cache, most) == expected


def test_tiny_layers_have_a_limited_number_of_copies():
    assert copies_for(1, 1 << 30, 1 << 40) == module._MOST_COPIES


def test_calls_go_through_all_copies_in_turn_across_samples():
    called: list[int] = []
    layers = [lambda x, number=number: (called.append(number), x)[1] for number in range(3)]
    ring = module.Ring(layers, 10, cold=True, dtype=torch.float32)
    x = torch.ones(1, 2)
    # Once through all, and then three calls of a third of a second each.
    assert ring.calls_for(x, ticking()) == 1
    assert called == [0, 1, 2, 0, 1, 2]
    called.clear()
    assert ring.sample(x, 4, ticking(cores=2)) == Span(0.25, 0.5)
    assert ring.sample(x, 2, ticking()) == Span(0.5, 0.5)
    assert called == [0, 1, 2, 0, 1, 2]


def test_the_models_own_layers_come_first_and_copies_are_equal_but_apart(model):
    kind = layer_kinds(model)[0]
    layers = module._compressed_copies(kind, 6)
    assert all(one is two for one, two in zip(layers, kind.modules, strict=False))
    places = {(each.words if each.kernel is Kernel.CPU else each.weight_codes).data_ptr() for each in layers}
    assert len(layers) == len(places) == 6
    x = torch.randn(2, kind.in_features)
    assert torch.equal(layers[5](x), kind.modules[0](x))
    assert len(module._compressed_copies(kind, 2)) == 2


def test_all_kinds_are_measured_beside_dense_layers(model, monkeypatch):
    monkeypatch.setattr(module, "_MOST_COPIES", 3)
    kinds = layer_kinds(model)
    found = measure_layers(
        kinds, torch.bfloat16, rounds=2, cache_bytes=20_000, free_bytes=1 << 30, clock=ticking(), show_progress=False
    )
    assert [each.kind for each in found] == kinds
    for each in found:
        assert each.dtype == "bfloat16"
        assert [way.name for way in each.dense] == ["float32", "bfloat16"]
        weights = each.kind.out_features * each.kind.in_features
        assert [way.weight_bytes for way in (each.compressed, *each.dense)] == [
            each.kind.stored_bytes,
            4 * weights,
            2 * weights,
        ]
        for way in (each.compressed, *each.dense):
            assert {rows: timed.spans for rows, timed in way.calls.items()} == {
                1: (Span(1.0, 1.0),) * 2,
                64: (Span(1.0, 1.0),) * 2,
            }
            assert way.cold == (way.copies * way.weight_bytes > 20_000)
    assert [each.compressed.cold for each in found] == [False] * 5 + [True]
    assert [each.dense[0].cold for each in found] == [True, False, True, True, True, True]


def test_dense_layers_compute_what_the_compressed_one_does(model, monkeypatch):
    seen: dict[str, torch.Tensor] = {}
    sample = module.Ring.sample

    def note(self, x, calls, clock):
        if x.dtype == torch.float32 and len(x) == 64:
            seen[str(self.nbytes)] = self.layers[0](x)
        return sample(self, x, calls, clock)

    monkeypatch.setattr(module.Ring, "sample", note)
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
    one, two = seen.values()
    assert torch.allclose(one, two, atol=1e-4)


def test_shares_of_the_roof_are_told_only_of_weights_from_memory():
    calls = {1: Timed((Span(0.002, 0.002), Span(0.004, 0.004), Span(0.001, 0.001)))}
    roof = Roof(10e9, "sum", 1)
    assert WaySpeed("compressed", 5_000_000, 10, True, calls).roof_share(roof, 1) == pytest.approx(0.25)
    assert WaySpeed("compressed", 5_000_000, 1, False, calls).roof_share(roof, 1) is None


def test_nothing_is_left_changed_in_the_model(model, tmp_path: Path):
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
