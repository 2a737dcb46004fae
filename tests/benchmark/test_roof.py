"""The memory bandwidth is that of the fastest pass over a buffer that fits in no cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmark_clocks import ticking

from shiftadd_cli.benchmark import roof as module
from shiftadd_cli.benchmark.roof import Roof, better_roof, read_roof, roof_bytes
from shiftadd_cli.benchmark.timing import Clock, Span

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("cache", "free", "expected"),
    [
        (8 * MIB, 64 * GIB, 256 * MIB),
        (100 * MIB, 64 * GIB, 400 * MIB),
        (900 * MIB, 64 * GIB, GIB),
        (100 * MIB, GIB, 256 * MIB),
    ],
)
def test_the_buffer_exceeds_the_cache_within_memory(cache: int, free: int, expected: int) -> None:
    assert roof_bytes(cache, free) == expected


def test_the_bandwidth_is_bytes_over_seconds() -> None:
    roof = read_roof(1 << 20, clock=ticking())
    assert (roof.bytes_per_second, roof.buffer_bytes) == (1 << 20, 1 << 20)


def test_the_fastest_pass_of_the_fastest_method_counts() -> None:
    # Clock readings before and after each pass: two passes with each of three methods.
    seconds = [5, 4, 3, 2, 8, 9]
    readings = [value for span in seconds for value in (0.0, float(span))]
    roof = read_roof(1 << 20, passes=2, clock=Clock(iter(readings).__next__, lambda: 0.0))
    assert (roof.method, roof.bytes_per_second) == ("dot", (1 << 20) / 2)


def test_all_methods_read_the_full_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[float] = []

    def record(self: Clock, work: Callable[[], torch.Tensor]) -> Span:
        sums.append(float(work().sum()))
        return Span(1.0, 1.0)

    monkeypatch.setattr(Clock, "time", record)
    read_roof(1 << 20, passes=1)
    assert sums == [1 << 18] * 3


def test_the_buffer_has_the_requested_length() -> None:
    buffer = module._buffer(1 << 16)
    assert (buffer.shape, buffer.dtype) == ((1 << 16,), torch.float32)
    assert (buffer == 1).all()


def test_the_better_of_two_roofs_has_the_higher_bandwidth() -> None:
    low, high = Roof(10e9, "sum", 1), Roof(20e9, "dot", 1)
    assert better_roof(low, high) is better_roof(high, low) is high
    assert high.share(5_000_000, 0.001) == 0.25
