"""Progress loops yield every item, and say how far they are without flooding a log."""

from __future__ import annotations

import io
import re

import pytest

from shiftadd_cli import progress as module
from shiftadd_cli.progress import duration, progress


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize("total", [1, 3, 10, 97, 1000])
def test_log_gets_a_line_per_tenth_and_every_item_is_yielded(
    capsys: pytest.CaptureFixture[str], clock: Clock, total: int
) -> None:
    items = []
    for item in progress(range(total), total, "Work"):
        items.append(item)
        clock.now += 250 / total
    assert items == list(range(total))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert min(total, 10) == len(lines)
    assert lines[-1].startswith(f"Work: {total}/{total} (100%)")


def test_quick_loop_logs_one_line(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    assert list(progress(range(50), 50, "Work")) == list(range(50))
    assert capsys.readouterr().err == "Work: 50/50 (100%), 0 s in all\n"


def test_slow_steps_log_a_line_every_half_minute_with_the_time_left(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    for _ in progress(range(100), 100, "Work"):
        clock.now += 31
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100
    assert lines[49] == "Work: 50/100 (50%), 25 min 50 s left"
    assert lines[-1] == "Work: 100/100 (100%), 51 min 40 s in all"


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(progress(range(5), 5, "Work")) == list(range(5))
    assert re.search(r"Work: 100%.*5/5", terminal.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_durations_carry_over(seconds: float, text: str) -> None:
    assert duration(seconds) == text
