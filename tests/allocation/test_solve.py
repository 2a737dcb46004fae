"""The integer program against exhaustive search."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence

import pytest
from bcq_problems import quick
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.allocation.solve import LayerOptions, allocate, allocate_smallest, tied_groups
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.errors import AllocationError

# Layers, ties and a budget of bytes.
Problem = tuple[list[LayerOptions], list[list[str]], int]
# Layers, ties and a limit on the cost.
Limited = tuple[list[LayerOptions], list[list[str]], float]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to five layers with two to four candidates, some pinned, some tied, and a budget."""
    kinds = st.integers(1, 8) | st.sampled_from(["shift1-3", "shift2-3", "shift2-4"])
    candidates = draw(st.lists(kinds, min_size=2, max_size=4, unique=True))
    layers = []
    for index in range(draw(st.integers(1, 5))):
        bits = candidates if draw(st.booleans()) else candidates[: draw(st.integers(1, len(candidates)))]
        layers.append(
            LayerOptions(
                f"layer.{index}",
                {choice: draw(st.integers(1, 400)) for choice in bits},
                {choice: draw(st.floats(0, 10, allow_subnormal=False)) for choice in bits},
            )
        )
    names = [layer.name for layer in layers]
    tied = draw(st.lists(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True), max_size=2))
    return layers, tied, draw(st.integers(0, 1500))


def assignments(
    layers: Sequence[LayerOptions], tied: Sequence[Sequence[str]]
) -> Iterator[tuple[float, int, dict[str, Choice]]]:
    """Every assignment that respects the ties: (cost, bytes, bits by name)."""
    for bits in itertools.product(*(layer.bytes for layer in layers)):
        chosen = {layer.name: choice for layer, choice in zip(layers, bits, strict=True)}
        if all(len({chosen[name] for name in names}) == 1 for names in tied):
            cost = math.fsum(layer.costs[chosen[layer.name]] for layer in layers)
            yield cost, sum(layer.bytes[chosen[layer.name]] for layer in layers), chosen


@quick
@given(problems())
def test_no_choice_within_the_budget_costs_less(problem: Problem) -> None:
    layers, tied, budget = problem
    fitting = [cost for cost, stored, _ in assignments(layers, tied) if stored <= budget]
    if not fitting:
        with pytest.raises(AllocationError):
            allocate(layers, tied, budget)
        return
    chosen = allocate(layers, tied, budget)
    assert set(chosen) == {layer.name for layer in layers}
    cost, stored, _ = next(option for option in assignments(layers, tied) if option[2] == chosen)
    assert stored <= budget
    assert cost == pytest.approx(min(fitting), rel=1e-9, abs=1e-8)


@st.composite
def limits(draw: st.DrawFn) -> Limited:
    """A problem and a limit on its cost, which some choice meets to the last bit or misses by it, or any number."""
    layers, tied, _ = draw(problems())
    digits = draw(st.sampled_from([1, 3, 17]))
    layers = [
        LayerOptions(layer.name, layer.bytes, {bits: float(f"{cost:.{digits}g}") for bits, cost in layer.costs.items()})
        for layer in layers
    ]
    costs = [cost for cost, _, _ in assignments(layers, tied)]
    if not costs or draw(st.booleans()):
        return layers, tied, draw(st.floats(0, 60))
    target = draw(st.sampled_from(costs))
    return (
        layers,
        tied,
        draw(st.sampled_from([target, math.nextafter(target, 0), target * (1 - 1e-7), target * (1 + 1e-7)])),
    )


@quick
@given(limits())
def test_no_choice_within_the_loss_limit_is_smaller(problem: Limited) -> None:
    layers, tied, most = problem
    fitting = [(stored, cost) for cost, stored, _ in assignments(layers, tied) if cost <= most]
    if not fitting:
        with pytest.raises(AllocationError):
            allocate_smallest(layers, tied, most)
        return
    chosen = allocate_smallest(layers, tied, most)
    assert set(chosen) == {layer.name for layer in layers}
    cost, stored, _ = next(option for option in assignments(layers, tied) if option[2] == chosen)
    assert cost <= most
    smallest = min(fitting)
    assert stored == smallest[0]
    # No choice of that size is better.
    assert cost == pytest.approx(smallest[1], rel=1e-9, abs=1e-8)


def test_layers_of_very_different_sizes_are_chosen_to_the_byte() -> None:
    """Solvers of integer programs exceed a limit by up to a millionth, which is more than the small layers take."""
    rng = random.Random(3)
    for _ in range(20):
        layers = [
            LayerOptions(
                str(index),
                {bits: int(10 ** (index % 8) * rng.uniform(1, 2)) * bits for bits in (2, 3, 4)},
                {bits: 10 ** -(index % 6) * rng.uniform(1, 2) * 4.0**-bits for bits in (2, 3, 4)},
            )
            for index in range(8)
        ]
        choices = list(assignments(layers, []))
        most, budget, _ = rng.choice(choices)
        for limit in (most, math.nextafter(most, 0), most * (1 - 1e-9)):
            best = min((stored, cost) for cost, stored, _ in choices if cost <= limit)
            chosen = allocate_smallest(layers, [], limit)
            assert (sum(layer.bytes[chosen[layer.name]] for layer in layers)) == best[0]
            assert math.fsum(layer.costs[chosen[layer.name]] for layer in layers) <= limit
        chosen = allocate(layers, [], budget)
        least = min(cost for cost, stored, _ in choices if stored <= budget)
        assert sum(layer.bytes[chosen[layer.name]] for layer in layers) <= budget
        assert math.fsum(layer.costs[chosen[layer.name]] for layer in layers) == pytest.approx(least, rel=1e-8)


def test_an_unreachable_loss_names_the_range() -> None:
    layers = [LayerOptions(name, {2: 100, 3: 150}, {2: 1.0, 3: 0.1}) for name in "abc"]
    with pytest.raises(AllocationError, match=r"from 0\.3001 to 3; raise `max_divergence`"):
        allocate_smallest(layers, [], 0.2999)
    # The named limit can be met, although three times 0.1 is slightly more than 0.3.
    assert set(allocate_smallest(layers, [], 0.3001).values()) == {3}
    assert set(allocate_smallest(layers, [], 3).values()) == {2}
    assert set(allocate_smallest(layers, [], 1e9).values()) == {2}


def test_the_least_loss_wins_among_equal_sizes() -> None:
    layers = [LayerOptions(str(index), {2: 100, 3: 150}, {2: 1.0 + index / 10, 3: 0.5}) for index in range(6)]
    chosen = allocate_smallest(layers, [], 5.7)
    assert [name for name, bits in chosen.items() if bits == 3] == ["4", "5"]


def test_a_budget_that_is_too_small_names_the_range() -> None:
    layers = [LayerOptions(name, {2: 100, 3: 150}, {2: 1.0, 3: 0.5}) for name in "ab"]
    with pytest.raises(AllocationError, match="from 200 to 300"):
        allocate(layers, [], 199)
    assert set(allocate(layers, [], 200).values()) == {2}
    assert set(allocate(layers, [], 300).values()) == {3}


def test_bits_without_a_gain_are_not_spent() -> None:
    layers = [LayerOptions("a", {2: 100, 3: 150, 4: 200}, {2: 1.0, 3: 0.5, 4: 0.5})]
    assert allocate(layers, [], 10_000) == {"a": 3}


def test_overlapping_ties_are_merged() -> None:
    assert tied_groups("abcd", [("a", "b"), ("d", "b")]) == [("a", "b", "d"), ("c",)]
    assert tied_groups("abcd", [("a", "b"), ("c", "d"), ("d", "a")]) == [("a", "b", "c", "d")]
    assert tied_groups("ab", []) == [("a",), ("b",)]


def test_tied_layers_pinned_to_different_bits_are_refused_by_name() -> None:
    layers = [LayerOptions("q", {2: 1}, {2: 1.0}), LayerOptions("k", {3: 1}, {3: 1.0})]
    with pytest.raises(AllocationError, match=r"q \(2\), k \(3\)"):
        allocate(layers, [("q", "k")], 100)


def test_eighty_blocks_take_seconds_and_come_close_to_the_optimum(capfd: pytest.CaptureFixture[str]) -> None:
    """These are the 560 linears of a 70B model. The continuous relaxation bounds the distance to the optimum."""
    rng = random.Random(0)
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    layers = []
    for block in range(80):
        for kind, (rows, columns) in enumerate(shapes):
            weight = 10 ** rng.uniform(-3, 0)
            sizes: dict[Choice, int] = {bits: rows * (columns * bits // 8 + 8 * bits + 2) for bits in (2, 3, 4, 5)}
            costs: dict[Choice, float] = {bits: weight * 4.0**-bits * rng.uniform(0.8, 1.2) for bits in (2, 3, 4, 5)}
            layers.append(LayerOptions(f"{block}.{kind}", sizes, costs))
    weights = sum(rows * columns for rows, columns in shapes) * 80
    budget = int(2.75 * weights / 8)
    start = time.process_time()
    chosen = allocate(layers, [], budget)
    assert time.process_time() - start < 5
    # A solver's messages would end up in the middle of the command's own output.
    assert capfd.readouterr().out == ""
    stored = sum(layer.bytes[chosen[layer.name]] for layer in layers)
    cost = sum(layer.costs[chosen[layer.name]] for layer in layers)
    assert stored <= budget
    assert cost >= (bound := relaxation(layers, budget))
    assert cost <= bound * 1.001
    start = time.process_time()
    smallest = allocate_smallest(layers, [], cost)
    assert time.process_time() - start < 30
    assert sum(layer.costs[smallest[layer.name]] for layer in layers) <= cost * (1 + 1e-12)
    # The best choice for this many bytes is also (nearly) the smallest for its loss.
    assert stored * 0.9999 <= sum(layer.bytes[smallest[layer.name]] for layer in layers) <= stored


def relaxation(layers: Sequence[LayerOptions], budget: int) -> float:
    """The best Lagrangian bound on the cost, by bisection over the price of a byte."""
    low, high, best = 0.0, 1.0, 0.0
    for _ in range(200):
        price = (low + high) / 2
        picks = [cheapest(layer, price) for layer in layers]
        stored = sum(layer.bytes[bits] for layer, bits in zip(layers, picks, strict=True))
        cost = sum(layer.costs[bits] for layer, bits in zip(layers, picks, strict=True))
        best = max(best, cost + price * (stored - budget))
        low, high = (price, high) if stored > budget else (low, price)
    return best


def cheapest(layer: LayerOptions, price: float) -> Choice:
    """The choice with the least cost at this price of a byte."""
    return min(layer.bytes, key=lambda bits: layer.costs[bits] + price * layer.bytes[bits])
