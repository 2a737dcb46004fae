"""A benchmark as text for a terminal or a log: ratios first, then medians with minimum and maximum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from shiftadd_cli.benchmark.layer_speed import ROWS, LayerSpeed, WaySpeed
from shiftadd_cli.benchmark.model_speed import ModelSpeed
from shiftadd_cli.benchmark.result import Benchmark
from shiftadd_cli.benchmark.roof import Roof
from shiftadd_cli.benchmark.timing import Spread, Timed
from shiftadd_cli.cli.summary import table
from shiftadd_cli.sizes import size


def describe_benchmark(result: Benchmark) -> str:
    """Tables of the models and the layers, followed by the measurement conditions."""
    first = result.models[0]
    lines = [_models(result), ""]
    if result.roof is not None and result.layers:
        lines += [_layers(result.layers, result.roof), ""]
    lines.append(f"Model         {first.name}, {result.described}")
    if len(result.models) > 1:
        lines.append(f"Original      {result.models[1].info.spec}, stored in {result.models[1].info.stored_dtype}")
        lines.append("Ratios        above 1: the model is that much faster or smaller; taken in every round")
    lines += [
        f"Rounds        {result.rounds} in turns after one to warm up; medians, with the lowest and the highest",
        f"Machine       {result.machine.cpu}, {_count(result.machine.cores, 'core')}, "
        f"{_count(result.machine.threads, 'thread')}, "
        + (
            "last-level cache unknown"
            if result.machine.cache_bytes is None
            else f"last-level cache of {result.machine.cache_bytes >> 20} MiB"
        ),
    ]
    if result.roof is not None:
        lines.append(
            f"Memory        read at {result.roof.bytes_per_second / 1e9:.1f} GB/s at best "
            f"({result.roof.method} over {size(result.roof.buffer_bytes)}); the table gives each call's share of this"
        )
        if not result.layers:
            lines.append("Layers        none: the model has no compressed linear layer")
        elif any(not way.cold for layer in result.layers for way in (layer.compressed, *layer.dense)):
            lines.append(
                "In cache      the copies of the weight that the calls cycle through fit in the last-level cache, so "
                "no share can be given"
            )
    return "\n".join(lines)


def _models(result: Benchmark) -> str:
    first, *others = result.models
    gains = [first.gains_over(other) for other in others]

    def row(label: str, cells: Iterable[str], gain: str | None = None) -> list[str]:
        ratios = ["" if gain is None else _ratio(over[gain]) for over in gains]
        return [label, *ratios, *cells]

    models = result.models
    rows = [
        *(
            row(f"{name}, {first.unit}/s", (_spread(model.work[name].rate) for model in models), name)
            for name in first.work
        ),
        row("load, s", (_spread(model.load.seconds) for model in models), "load"),
        row("weights in memory", (size(model.weight_bytes) for model in models), "weights in memory"),
        row("process grew by", map(_grown, models)),
        row("size on disk", (size(model.info.file_bytes) for model in models), "size on disk"),
        *(row(f"cores busy, {name}", (_spread(model.work[name].cores) for model in models)) for name in first.work),
    ]
    names = _short_names(models)
    return table(["", *(f"x {name}" for name in names[1:]), *names], rows)


def _short_names(models: Sequence[ModelSpeed]) -> list[str]:
    """Specs and dtypes; parent folders are dropped from the specs unless that makes two models look alike."""
    specs = [model.info.spec for model in models]
    short = {spec: Path(spec).name or spec for spec in specs}
    if len(set(short.values())) < len(short):
        short = {spec: spec for spec in specs}
    return [f"{short[model.info.spec]}, {model.info.dtype}" for model in models]


def _layers(layers: tuple[LayerSpeed, ...], roof: Roof) -> str:
    dense = [way.name for way in layers[0].dense]
    header = [
        *("layer", "count", "rows", *(f"x {name}" for name in dense), f"us in {layers[0].dtype}"),
        *(f"dense {name}, us" for name in dense),
        *("of the roof", *(f"dense {name}" for name in dense), "cores busy"),
    ]
    rows = []
    for rows_in in ROWS:
        for layer in layers:
            mine = layer.compressed.calls[rows_in]
            ways = (layer.compressed, *layer.dense)
            rows.append(
                [
                    _layer_name(layer),
                    str(len(layer.kind.modules)),
                    str(rows_in),
                    *(_ratio(way.calls[rows_in].seconds.over(mine.seconds)) for way in layer.dense),
                    *(_micro(way.calls[rows_in]) for way in ways),
                    *(_share(way, roof, rows_in) for way in ways),
                    _number(mine.cores.median),
                ]
            )
    return table(header, rows)


def _layer_name(layer: LayerSpeed) -> str:
    kind = layer.kind
    leaves = "/".join(dict.fromkeys(name.rpartition(".")[2] for name in kind.names))
    return f"{leaves}, {kind.out_features} x {kind.in_features}, {kind.form}"


def _share(way: WaySpeed, roof: Roof, rows: int) -> str:
    share = way.roof_share(roof, rows)
    return "in cache" if share is None else f"{share:.1%}"


def _micro(timed: Timed) -> str:
    return _spread(Spread(tuple(1e6 * value for value in timed.seconds.values)))


def _grown(model: ModelSpeed) -> str:
    # For a tiny model, the growth can be smaller than the process's own fluctuation, and so negative.
    return "-" if model.resident_bytes is None else size(max(0.0, model.resident_bytes.median))


def _ratio(spread: Spread) -> str:
    return f"{_number(spread.median)} x"


def _spread(spread: Spread) -> str:
    return f"{_number(spread.median)} ({_number(spread.low)} - {_number(spread.high)})"


def _number(value: float) -> str:
    """The number with at least three digits."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
