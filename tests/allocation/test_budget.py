from __future__ import annotations

import pytest

from shiftadd_cli.allocation.budget import Budget, parse_curve
from shiftadd_cli.errors import AllocationError


def test_average_bits_are_never_exceeded_by_rounding() -> None:
    budget = Budget.parse(2.3, None)
    assert budget.layer_bytes(1001, other_bytes=5_000, parameters=9_000) == 287
    assert 8 * 287 / 1001 <= 2.3 < 8 * 288 / 1001
    assert budget.in_words(287, 1001, 5_000, 9_000) == "2.294 bits per weight"
    assert budget.in_words(250, 999, 0, 999) == "2.003 bits per weight"


@pytest.mark.parametrize(
    ("text", "count"), [("70MB", 70_000_000), ("1.5 gb", 1_500_000_000), ("0.25KB", 250), ("3GB", 3_000_000_000)]
)
def test_sizes_are_decimal_and_leave_room_for_other_tensors(text: str, count: int) -> None:
    budget = Budget.parse(None, text)
    assert budget.file_bytes == count
    assert budget.layer_bytes(10, other_bytes=100, parameters=20) == count - 100
    assert budget.in_words(1_000_000, 10, 500_000, 20) == "1.500 MB"
    assert budget.in_words(1_000_001, 10, 500_000, 20) == "1.501 MB"


@pytest.mark.parametrize(
    ("bits", "size"),
    [(None, None), (2.5, "70MB"), (0.0, None), (-1.0, None), (float("nan"), None), (None, "70"), (None, "-1MB")],
)
def test_other_budgets_are_refused_with_a_remedy(bits: float | None, size: str | None) -> None:
    with pytest.raises(AllocationError, match=r"give .*(2\.5|70MB|`target_size`)"):
        Budget.parse(bits, size)


def test_bits_of_the_file_are_never_exceeded_by_rounding() -> None:
    budget = Budget.parse(average_file_bits=3.5)
    assert budget.file_limit(1001) == 437
    assert 8 * 437 / 1001 <= 3.5 < 8 * 438 / 1001
    assert budget.layer_bytes(800, other_bytes=100, parameters=1001) == 337
    assert budget.in_words(337, 800, 100, 1001) == "3.493 bits per weight over the whole file"
    assert (budget.average_bits, budget.divergence) == (None, None)
    assert budget.text == "3.5 bits per weight over the whole file"
    with pytest.raises(AllocationError, match=r"`avg_file_bits` -1 is not valid; give a number above 0"):
        Budget.parse(average_file_bits=-1)


def test_a_divergence_is_a_budget_too() -> None:
    budget = Budget.parse(None, None, 0.05)
    assert (budget.divergence, budget.average_bits, budget.file_bytes) == (0.05, None, None)
    assert budget.text == "0.05 nats/token of predicted loss"


@pytest.mark.parametrize("nats", [0.0, -0.1, float("nan"), float("inf")])
def test_an_invalid_divergence_is_refused_with_a_remedy(nats: float) -> None:
    with pytest.raises(AllocationError, match=r"`max_divergence` .*above 0, such as 0\.05"):
        Budget.parse(None, None, nats)


@pytest.mark.parametrize(("bits", "size", "nats"), [(None, "70MB", 0.1), (2.5, None, 0.1), (2.5, "70MB", 0.1)])
def test_two_budgets_are_refused(bits: float | None, size: str | None, nats: float) -> None:
    with pytest.raises(AllocationError, match="give one of `avg_bits`, `avg_file_bits`, `target_size` and "):
        Budget.parse(bits, size, nats)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("2:3:0.25", [2, 2.25, 2.5, 2.75, 3]),
        ("2.1:2.5:0.1", [2.1, 2.2, 2.3, 2.4, 2.5]),
        ("2:3:0.6", [2, 2.6]),
        ("3:3:1", [3]),
    ],
)
def test_a_curve_goes_from_first_to_last(text: str, points: list[float]) -> None:
    assert [budget.average_bits for budget in parse_curve(text)] == points


@pytest.mark.parametrize(
    "text", ["", "2:4", "4:2:0.25", "2:4:0", "0:4:1", "2:4:x", "-1:4:1", "2:4:0.0000001", "1:8:0.01"]
)
def test_an_invalid_or_endless_curve_is_refused(text: str) -> None:
    with pytest.raises(AllocationError, match="`curve`"):
        parse_curve(text)
