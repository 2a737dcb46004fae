"""Candidates take turns, the warm-up does not count, and medians and ratios are taken over the rounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from benchmark_clocks import ticking

from shiftadd_cli.benchmark.timing import Clock, Span, Spread, Timed, interleave, turns


def test_every_round_has_all_names_and_starts_with_the_next_one() -> None:
    assert turns(["a", "b", "c"], 3) == [
        (0, "a"), (0, "b"), (0, "c"),
        (1, "b"), (1, "c"), (1, "a"),
        (2, "c"), (2, "a"), (2, "b"),
        (3, "a"), (3, "b"), (3, "c"),
    ]  # fmt: skip


def test_work_takes_turns_and_the_warm_up_does_not_count() -> None:
    log: list[str] = []

    def work(name: str) -> Callable[[], int]:
        def run() -> int:
            log.append(name)
            return len(log)

        return run

    results = interleave({"a": work("a"), "b": work("b")}, rounds=2)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [4, 5], "b": [3, 6]}


def test_progress_is_shown_only_with_a_label(capsys: pytest.CaptureFixture[str]) -> None:
    interleave({"a": lambda: None}, rounds=1, desc="Working")
    assert "Working: 2/2 (100%)" in capsys.readouterr().err
    interleave({"a": lambda: None}, rounds=1)
    assert capsys.readouterr().err == ""


def test_a_clock_measures_wall_and_processor_time() -> None:
    assert ticking(cores=1.5).time(lambda: None) == Span(1.0, 1.5)
    assert Span(6.0, 3.0) / 3 == Span(2.0, 1.0)
    real = Clock().time(lambda: sum(range(1000)))
    assert real.wall > 0
    assert real.cpu >= 0


def test_a_spread_has_a_median_and_extremes() -> None:
    spread = Spread((4.0, 1.0, 2.0, 100.0))
    assert (spread.median, spread.low, spread.high) == (3.0, 1.0, 100.0)
    assert spread.to_dict() == {"median": 3.0, "min": 1.0, "max": 100.0, "rounds": [4.0, 1.0, 2.0, 100.0]}


def test_ratios_are_taken_round_by_round() -> None:
    # The second round is ten times slower for both, which changes no ratio. The ratio of the medians would be 1.5.
    fast, slow = Spread((1.0, 10.0, 2.0)), Spread((2.0, 20.0, 3.0))
    assert slow.over(fast).values == (2.0, 2.0, 1.5)
    assert slow.over(fast).median == 2.0
    with pytest.raises(ValueError, match="shorter"):
        slow.over(Spread((1.0,)))


def test_rates_and_cores_follow_from_the_spans() -> None:
    timed = Timed((Span(2.0, 3.0), Span(4.0, 4.0)), amount=8)
    assert timed.seconds.values == (2.0, 4.0)
    assert timed.rate.values == (4.0, 2.0)
    assert timed.cores.values == (1.5, 1.0)
    cpu_seconds = timed.to_dict()["cpu_seconds"]
    assert isinstance(cpu_seconds, dict)
    assert cpu_seconds["rounds"] == [3.0, 4.0]
