from __future__ import annotations

import math
import random
from typing import Any

import pytest

from shiftadd_cli.report.charts import Chart, Line, histogram, line_chart


def draw(*lines: Line, **options: Any) -> Chart:
    return line_chart("title", "description", lines, x_label="x", y_label="y", **options)


def inside(chart: Chart, x: float, y: float) -> bool:
    return chart.left - 0.1 <= x <= chart.right + 0.1 and chart.top - 0.1 <= y <= chart.bottom + 0.1


@pytest.mark.parametrize(
    "points",
    [
        [(0.0, 1.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(3.0, 5.0), (3.0, 5.0)],
        [(0.0, 1e-9), (29.0, 1e3)],
        [(0.0, 0.0), (1.0, 1e-12)],
        [(0.0, 0.031), (29.0, 0.033)],
        [(0.0, -2.0), (1.0, 3.0)],
        [(0.0, 0.1), (1.0, 1.0)],
    ],
)
def test_points_and_ticks_lie_in_the_frame(points: list[tuple[float, float]]) -> None:
    chart = draw(Line("line", points))
    assert all(inside(chart, x, y) for x, y in chart.series[0].points)
    assert all(inside(chart, tick.place, chart.top) for tick in chart.x_ticks)
    assert all(inside(chart, chart.left, tick.place) for tick in chart.y_ticks)
    assert 1 <= len(chart.x_ticks) <= 12
    assert 2 <= len(chart.y_ticks) <= 12


@pytest.mark.parametrize("high", [2.0, 1000.0])
def test_ticks_lie_where_points_of_their_value_lie(high: float) -> None:
    values = [1.0, high, *(1.0 + (high - 1.0) * random.Random(0).random() for _ in range(5))]
    labelled = draw(Line("line", [(0.0, value) for value in values])).y_ticks
    for tick in labelled:
        if 1.0 <= float(tick.label) <= high:
            again = draw(Line("line", [(0.0, 1.0), (0.0, high), (0.0, float(tick.label))]))
            assert again.series[0].points[2][1] == pytest.approx(tick.place, abs=0.11)


def test_larger_values_lie_higher_and_further_right_even_over_decades() -> None:
    (series,) = draw(Line("line", [(1.0, 1e-4), (2.0, 1e-3), (3.0, 1e-2)])).series
    (x1, y1), (x2, y2), (x3, y3) = series.points
    assert x1 < x2 < x3
    assert y1 > y2 > y3
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)


def test_charts_of_the_same_span_have_the_same_axis() -> None:
    low, high = (draw(Line("line", [(0.0, value)]), span=(0.01, 0.5)) for value in (0.01, 0.5))
    assert low.y_ticks == high.y_ticks
    assert low.series[0].points[0][1] == low.bottom
    assert high.series[0].points[0][1] == high.top


def test_whole_x_labels_only_integers() -> None:
    chart = draw(Line("line", [(0.0, 1.0), (1.0, 2.0)]), whole_x=True)
    assert [tick.label for tick in chart.x_ticks] == ["0", "1"]


def test_all_lines_look_different() -> None:
    lines = [Line(str(index), [(0.0, float(index)), (1.0, 1.0)]) for index in range(25)]
    assert len({(series.mark, series.style) for series in draw(*lines).series}) == 25


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1.0] * 7, [10.0**-n for n in range(9)], [0.0, 1.0, 1000.0]])
def test_histogram_counts_every_value_once(values: list[float]) -> None:
    chart = histogram("title", "description", values, x_label="x", y_label="y")
    assert sum(int(bar.label.split()[0]) for bar in chart.bars) == len(values)
    for bar in chart.bars:
        assert inside(chart, bar.x, bar.y)
        assert inside(chart, bar.x + bar.width, bar.y + bar.height)
        assert bar.width > 0
        assert bar.height > 0


def test_histogram_puts_values_into_the_right_bins() -> None:
    values = [math.exp(random.Random(seed).gauss(0, 1)) for seed in range(400)]
    for bar in histogram("title", "description", values, x_label="x", y_label="y").bars:
        count, _, start, _, stop = bar.label.split()
        # Labels have two digits.
        low, high = float(start) * 0.94, float(stop) * 1.06
        assert sum(low <= value <= high for value in values) >= int(count)
