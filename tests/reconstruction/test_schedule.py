"""Batches held back, and rates."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.reconstruction.schedule import hold_back, rising_and_falling


@given(st.integers(2, 500))
def test_every_batch_is_on_one_side_and_neither_side_is_empty(batches):
    train, held_back = hold_back(batches)
    assert train + held_back == list(range(batches))
    assert train
    assert held_back
    assert len(held_back) <= max(1, batches / 8)


@given(st.integers(1, 200))
def test_rates_rise_to_their_own_at_most_and_fall_to_almost_nothing(steps):
    rate = rising_and_falling(steps)
    rates = [rate(step) for step in range(steps)]
    assert all(0 < each <= 1 for each in rates)
    assert rates[-1] <= 1 / steps + 1e-12
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
