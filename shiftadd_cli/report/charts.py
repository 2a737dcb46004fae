"""Geometry of the charts on a page: turns numbers into drawing coordinates. The templates turn these into SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# In pixels. Drawings are as wide as a phone, so that their text is as large as the text around them.
WIDTH, HEIGHT = 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 36
_MARKS = ("circle", "square", "diamond", "triangle", "cross")

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    place: float
    label: str


@dataclass(frozen=True)
class Series:
    """Points in the drawing, joined by a line if `joined`. Mark and dashes tell series apart, not colour alone."""

    name: str
    points: tuple[Point, ...]
    mark: str
    style: int
    joined: bool = True
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bar:
    """A rectangle of a histogram."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its text; `title` and `description` describe it to readers who cannot see it."""

    title: str
    description: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    series: tuple[Series, ...] = ()
    bars: tuple[Bar, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


@dataclass(frozen=True)
class Line:
    """Data of a chart: points as numbers, with a label for each point or none at all."""

    name: str
    points: Sequence[Point]
    joined: bool = True
    labels: Sequence[str] = ()


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    span: tuple[float, float] | None = None,
    whole_x: bool = False,
) -> Chart:
    """Lines over a common axis; the vertical axis is logarithmic if all values are above 0 and span a factor of ten.

    span: smallest and largest value of the vertical axis, to make charts comparable; by default those of the lines.
    whole_x: only label integers. At least one point is needed.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    low, high = span or (min(ys), max(ys))
    logarithmic = low > 0 and high >= 10 * low
    across, x_ticks = _axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT, integers=whole_x, target=6)
    if logarithmic:
        down, y_ticks = _log_axis(low, high, HEIGHT - _BOTTOM, _TOP)
    else:
        down, y_ticks = _axis(min(low, 0.0) if low >= 0 else low, high, HEIGHT - _BOTTOM, _TOP, target=4)
    series = tuple(
        Series(
            line.name,
            tuple((_round(across(x)), _round(down(y))) for x, y in line.points),
            _MARKS[index % len(_MARKS)],
            # The sixth line has the mark of the first, with a different colour and dashes.
            (index + index // len(_MARKS)) % len(_MARKS),
            line.joined,
            tuple(line.labels),
        )
        for index, line in enumerate(lines)
    )
    return Chart(title, description, x_label, y_label, x_ticks, y_ticks, series)


def histogram(title: str, description: str, values: Sequence[float], *, x_label: str, y_label: str) -> Chart:
    """Histogram of the values. Bins have equal ratios if all values are above 0 and span a factor of ten, and equal
    widths otherwise. At least one value is needed.
    """
    low, high = min(values), max(values)
    logarithmic = low > 0 and high >= 10 * low
    if low == high:
        low, high = (low * 0.95, high * 1.05) if low > 0 else (low - 0.5, high + 0.5)
    scale, unscale = (math.log10, lambda power: 10.0**power) if logarithmic else (float, float)
    bins = max(5, min(24, math.ceil(2 * math.sqrt(len(values)))))
    step = (scale(high) - scale(low)) / bins
    counts = [0] * bins
    for value in values:
        counts[min(int((scale(value) - scale(low)) / step), bins - 1)] += 1
    across, x_ticks = (
        _log_axis(low, high, _LEFT, WIDTH - _RIGHT, target=5)
        if logarithmic
        else _axis(low, high, _LEFT, WIDTH - _RIGHT, target=5)
    )
    down, y_ticks = _axis(0, max(counts), HEIGHT - _BOTTOM, _TOP, integers=True, target=4)
    edges = [unscale(scale(low) + index * step) for index in range(bins + 1)]
    bars = []
    for count, start, stop in zip(counts, edges, edges[1:], strict=False):
        if count:
            left, right, top = across(start), across(stop), down(count)
            bars.append(
                Bar(
                    _round(left + 0.5),
                    _round(top),
                    _round(right - left - 1),
                    _round(HEIGHT - _BOTTOM - top),
                    f"{count} between {start:.2g} and {stop:.2g}",
                )
            )
    return Chart(title, description, x_label, y_label, x_ticks, y_ticks, bars=tuple(bars))


def _axis(
    low: float, high: float, start: float, stop: float, *, integers: bool = False, target: int
) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """A map from numbers in `low` to `high` to positions in `start` to `stop`, and ticks at round numbers."""
    if high == low:
        low, high = (low - 0.5, high + 0.5) if integers or low == 0 else (low - abs(low) / 10, high + abs(high) / 10)
    step = _round_step((high - low) / target)
    if integers:
        step = max(1.0, step)

    def position(value: float) -> float:
        return start + (value - low) / (high - low) * (stop - start)

    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return position, tuple(
        Tick(_round(position(index * step)), _label(index * step)) for index in range(first, last + 1)
    )


def _log_axis(
    low: float, high: float, start: float, stop: float, *, target: int = 6
) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    decades = math.log10(high) - math.log10(low)

    def position(value: float) -> float:
        # A value of 0 has no logarithm; it is drawn on the edge.
        inside = min(max(value, low), high)
        return start + (math.log10(inside) - math.log10(low)) / decades * (stop - start)

    leading: tuple[int, ...] = ()
    values: list[float] = []
    for leading in ((1, 2, 5), (1, 3), (1,)):
        values = [
            digit * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for digit in leading
            if low * (1 - 1e-9) <= digit * 10.0**power <= high * (1 + 1e-9)
        ]
        if len(values) <= target:
            break
    if len(values) > target:
        values = values[:: math.ceil(len(values) / target)]
    if len(values) < 2:
        values = [low, high]
    return position, tuple(Tick(_round(position(value)), _label(value)) for value in values)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))


def _label(value: float) -> str:
    if value and abs(value) < 0.001:
        digits, power = f"{value:.0e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:.3g}"


def _round(position: float) -> float:
    return round(position, 1)
