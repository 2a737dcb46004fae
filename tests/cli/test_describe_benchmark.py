"""The printed benchmark: ratios first, then medians with their ranges, and the conditions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from artifacts import COMMON, random_weight

from shiftadd_cli.bcq.weight import PackedLayout
from shiftadd_cli.benchmark.layer_speed import LayerSpeed, WaySpeed, layer_kinds
from shiftadd_cli.benchmark.machine import Machine
from shiftadd_cli.benchmark.model_speed import ModelSpeed
from shiftadd_cli.benchmark.result import Benchmark
from shiftadd_cli.benchmark.roof import Roof
from shiftadd_cli.benchmark.timing import Span, Spread, Timed
from shiftadd_cli.cli.describe_benchmark import describe_benchmark
from shiftadd_cli.runtime.linear import PackedLinear
from shiftadd_cli.runtime.opened import ModelInfo


def timed(*seconds: float, amount: int = 1) -> Timed:
    return Timed(tuple(Span(wall, 2 * wall) for wall in seconds), amount)


def model(spec: str, dtype: str, factor: float) -> ModelSpeed:
    info = ModelInfo(spec, factor == 1, int(7e6 * factor), 10, 8.0, None, "bfloat16", dtype, None, None)
    return ModelSpeed(
        f"{spec} in {dtype}",
        info,
        timed(factor, factor, factor),
        "tokens",
        {
            "decode": timed(2 * factor, factor, 4 * factor, amount=60),
            "prefill of 128": timed(factor, factor, 2 * factor, amount=128),
        },
        int(5e6 * factor),
        Spread((6e6 * factor,)),
    )


def layer(cold: bool) -> LayerSpeed:
    packed = PackedLinear.from_weight(random_weight(PackedLayout(COMMON, 64, 128)))

    def way(name: str, factor: float) -> WaySpeed:
        return WaySpeed(name, int(1e4 * factor), 5, cold, {1: timed(1e-5 * factor), 64: timed(4e-5 * factor)})

    return LayerSpeed(layer_kinds(packed)[0], "float32", way("compressed", 1), (way("float32", 8), way("bfloat16", 3)))


@pytest.fixture
def result() -> Benchmark:
    return Benchmark(
        machine=Machine("Some CPU", 4, 1, 32 << 20),
        conditions={"batch": 1, "new_tokens": 61},
        described="batch of 1; 61 new ones",
        rounds=3,
        models=(model("a/out", "float32", 1), model("b/original", "bfloat16", 2), model("b/original", "float32", 4)),
        roof=Roof(2e9, "dot", 256 << 20),
        layers=(layer(cold=True),),
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def row(text: str, label: str) -> list[str]:
    return cells(next(line for line in text.splitlines() if line.startswith(label)))


def test_ratios_come_before_medians_and_ranges(result: Benchmark) -> None:
    text = describe_benchmark(result)
    assert cells(text.splitlines()[0]) == [
        *("x original, bfloat16", "x original, float32", "out, float32", "original, bfloat16", "original, float32")
    ]
    assert row(text, "decode, tokens/s")[1:] == [
        *("2.00 x", "4.00 x", "30.0 (15.0 - 60.0)", "15.0 (7.50 - 30.0)", "7.50 (3.75 - 15.0)")
    ]
    assert row(text, "prefill of 128, tokens/s")[1:4] == ["2.00 x", "4.00 x", "128 (64.0 - 128)"]
    assert row(text, "load, s")[1:4] == ["2.00 x", "4.00 x", "1.00 (1.00 - 1.00)"]
    assert row(text, "weights in memory")[1:] == ["2.00 x", "4.00 x", "5.0 MB", "10.0 MB", "20.0 MB"]
    assert row(text, "process grew by")[1:] == ["6.0 MB", "12.0 MB", "24.0 MB"]
    assert row(text, "size on disk")[1:4] == ["2.00 x", "4.00 x", "7.0 MB"]
    assert row(text, "cores busy, decode")[1] == "2.00 (2.00 - 2.00)"


def test_layers_are_compared_with_dense_ones_and_the_roof(result: Benchmark) -> None:
    text = describe_benchmark(result)
    one, many = [cells(line) for line in text.splitlines() if line.startswith(", 64 x 128")]
    # 10 kB in 10 us are 1 GB/s, half of the roof.
    assert one == [
        *(", 64 x 128, 3 bits, apot2, 1 x 16", "1", "1", "8.00 x", "3.00 x"),
        *("10.0 (10.0 - 10.0)", "80.0 (80.0 - 80.0)", "30.0 (30.0 - 30.0)", "50.0%", "50.0%", "50.0%", "2.00"),
    ]
    assert many[2:6] == ["64", "8.00 x", "3.00 x", "40.0 (40.0 - 40.0)"]
    assert "In cache" not in text
    cached = describe_benchmark(replace(result, layers=(layer(cold=False),)))
    assert row(cached, ", 64 x 128")[-4:-1] == ["in cache"] * 3
    assert "In cache      the copies" in cached


def test_conditions_are_described(result: Benchmark) -> None:
    text = describe_benchmark(result)
    assert "a/out in float32, batch of 1; 61 new ones" in text
    assert "Original      b/original, stored in bfloat16" in text
    assert "3 in turns after one to warm up" in text
    assert "Some CPU, 4 cores, 1 thread, last-level cache of 32 MiB" in text
    assert "read at 2.0 GB/s at best (dot over 268.4 MB)" in text
    assert "last-level cache unknown" in describe_benchmark(replace(result, machine=Machine("CPU", 1, 2, None)))


def test_unmeasured_parts_are_left_out(result: Benchmark) -> None:
    alone = describe_benchmark(replace(result, models=result.models[:1], roof=None, layers=()))
    assert "Original" not in alone
    assert "Ratios" not in alone
    assert "Memory" not in alone
    assert "none: the model has no compressed linear layer" in describe_benchmark(replace(result, layers=()))


def test_specs_are_shortened_only_if_they_stay_distinct(result: Benchmark) -> None:
    first, second, _ = result.models
    same = replace(first, info=replace(first.info, spec="c/original"))
    header = cells(describe_benchmark(replace(result, models=(same, second))).splitlines()[0])
    assert header == ["x b/original, bfloat16", "c/original, float32", "b/original, bfloat16"]


def test_json_has_every_round_and_the_gains(result: Benchmark) -> None:
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["gains"]["b/original in float32"]["decode"]["rounds"] == [4.0, 4.0, 4.0]
    assert document["models"][0]["tokens_per_second"]["decode"] == {
        "median": 30.0,
        "min": 15.0,
        "max": 60.0,
        "rounds": [30.0, 60.0, 15.0],
    }
    assert (document["batch"], document["new_tokens"]) == (1, 61)
    assert document["models"][1]["spec"] == "b/original"
    (entry,) = document["layers"]
    assert entry["gains_over_dense"]["float32"]["1"]["median"] == pytest.approx(8.0)
    assert entry["ways"]["compressed"]["rows"]["1"]["roof_share"] == pytest.approx(0.5)
    assert entry["ways"]["bfloat16"]["rows"]["64"]["cpu_seconds"]["median"] == pytest.approx(2.4e-4)
    assert (document["roof"]["bytes_per_second"], document["machine"]["cache_bytes"]) == (2e9, 32 << 20)
    assert replace(result, roof=None, layers=()).to_dict()["layers"] == []
