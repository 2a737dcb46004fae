"""The integer program against trying everything."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
from bcq_problems import quick
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.allocation.solve import LayerOptions, allocate, allocate_smallest, tied_groups
from shiftadd_cli.errors import AllocationError


@st.composite
def problems(draw):
    """Up to five layers with two to four candidates, some pinned, some tied, and a budget."""
    kinds = st.integers(1, 8) | st.sampled_from(["shift1-3", "shift2-3", "shift2-4"])
    candidates = draw(st.lists(kinds, min_size=2, max_size=4, unique=True))
    layers = []
    for index in range(draw(st.integers(1, 5))):
        bits = candidates if draw(st.booleans()) else candidates[: draw(st.integers(1, len(candidates)))]
        layers.append(
            LayerOptions(
                f"layer.{index}",
                {each: draw(st.integers(1, 400)) for each in bits},
                {each: draw(st.floats(0, 10, allow_subnormal=False)) for each in bits},
            )
        )
    names = [layer.name for layer in layers]
    tied = draw(st.lists(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True), max_size=2))
    return layers, tied, draw(st.integers(0, 1500))


def everything(layers, tied):
    """Every assignment that respects the ties: (cost, bytes, bits by name)."""
    for bits in itertools.product(*(layer.bytes for layer in layers)):
        chosen = {layer.name: each for layer, each in zip(layers, bits, strict=True)}
        if all(len({chosen[name] for name in names}) == 1 for names in tied):
            cost = math.fsum(layer.costs[chosen[layer.name]] for layer in layers)
            yield cost, sum(layer.bytes[chosen[layer.name]] for layer in layers), chosen


@quick
@given(problems())
def test_nothing_that_fits_the_budget_costs_less(problem):
    layers, tied, budget = problem
    fitting = [cost for cost, stored, _ in everything(layers, tied) if stored <= budget]
    if not fitting:
        with pytest.raises(AllocationError):
            allocate(layers, tied, budget)
        return
    chosen = allocate(layers, tied, budget)
    assert set(chosen) == {layer.name for layer in layers}
    cost, stored, _ = next(each for each in everything(layers, tied) if each[2] == chosen)
    assert stored <= budget
    assert cost == pytest.approx(min(fitting), rel=1e-9, abs=1e-8)


@st.composite
def limits(draw):
    """A problem and a limit on its cost: one that some choice meets to the last bit, misses by it, or any number."""
    layers, tied, _ = draw(problems())
    digits = draw(st.sampled_from([1, 3, 17]))
    layers = [
        LayerOptions(each.name, each.bytes, {bits: float(f"{cost:.{digits}g}") for bits, cost in each.costs.items()})
        for each in layers
    ]
    all_of_them = [cost for cost, _, _ in everything(layers, tied)]
    if not all_of_them or draw(st.booleans()):
        return layers, tied, draw(st.floats(0, 60))
    meant = draw(st.sampled_from(all_of_them))
    return (
        layers,
        tied,
        draw(st.sampled_from([meant, math.nextafter(meant, 0), meant * (1 - 1e-7), meant * (1 + 1e-7)])),
    )


@quick
@given(limits())
def test_nothing_that_costs_so_little_is_smaller(problem):
    layers, tied, most = problem
    fitting = [(stored, cost) for cost, stored, _ in everything(layers, tied) if cost <= most]
    if not fitting:
        with pytest.raises(AllocationError):
            allocate_smallest(layers, tied, most)
        return
    chosen = allocate_smallest(layers, tied, most)
    assert set(chosen) == {layer.name for layer in layers}
    cost, stored, _ = next(each for each in everything(layers, tied) if each[2] == chosen)
    assert cost <= most
    smallest = min(fitting)
    assert stored == smallest[0]
    # And of that size there is nothing better.
    assert cost == pytest.approx(smallest[1], rel=1e-9, abs=1e-8)


def test_layers_of_very_different_sizes_are_chosen_to_the_byte():
    """What solvers of integer programs tolerate of a limit, a millionth, is more than the small layers are."""
    chance = random.Random(3)
    for _ in range(20):
        layers = [
            LayerOptions(
                str(index),
                {bits: int(10 ** (index % 8) * chance.uniform(1, 2)) * bits for bits in (2, 3, 4)},
                {bits: 10 ** -(index % 6) * chance.uniform(1, 2) * 4.0**-bits for bits in (2, 3, 4)},
            )
            for index in range(8)
        ]
        every = list(everything(layers, []))
        most, budget, _ = chance.choice(every)
        for limit in (most, math.nextafter(most, 0), most * (1 - 1e-9)):
            best = min((stored, cost) for cost, stored, _ in every if cost <= limit)
            chosen = allocate_smallest(layers, [], limit)
            assert (sum(layer.bytes[chosen[layer.name]] for layer in layers)) == best[0]
            assert math.fsum(layer.costs[chosen[layer.name]] for layer in layers) <= limit
        chosen = allocate(layers, [], budget)
        least = min(cost for cost, stored, _ in every if stored <= budget)
        assert sum(layer.bytes[chosen[layer.name]] for layer in layers) <= budget
        assert math.fsum(layer.costs[chosen[layer.name]] for layer in layers) == pytest.approx(least, rel=1e-8)


def test_a_loss_that_no_choice_has_names_the_range():
    layers = [LayerOptions(name, {2: 100, 3: 150}, {2: 1.0, 3: 0.1}) for name in "abc"]
    with pytest.raises(AllocationError, match=r"from 0\.3001 to 3; raise `max_divergence`"):
        allocate_smallest(layers, [], 0.2999)
    # What is said to be possible is, though three times 0.1 is a little more than 0.3.
    assert set(allocate_smallest(layers, [], 0.3001).values()) == {3}
    assert set(allocate_smallest(layers, [], 3).values()) == {2}
    assert set(allocate_smallest(layers, [], 1e9).values()) == {2}


def test_of_equal_sizes_the_one_that_loses_least_is_taken():
    layers = [LayerOptions(str(index), {2: 100, 3: 150}, {2: 1.0 + index / 10, 3: 0.5}) for index in range(6)]
    chosen = allocate_smallest(layers, [], 5.7)
    assert [name for name, bits in chosen.items() if bits == 3] == ["4", "5"]


def test_a_budget_that_is_too_small_names_the_range():
    layers = [LayerOptions(name, {2: 100, 3: 150}, {2: 1.0, 3: 0.5}) for name in "ab"]
    with pytest.raises(AllocationError, match="from 200 to 300"):
        allocate(layers, [], 199)
    assert set(allocate(layers, [], 200).values()) == {2}
    assert set(allocate(layers, [], 300).values()) == {3}


def test_more_bits_that_do_not_help_are_not_bought():
    layers = [LayerOptions("a", {2: 100, 3: 150, 4: 200}, {2: 1.0, 3: 0.5, 4: 0.5})]
    assert allocate(layers, [], 10_000) == {"a": 3}


def test_ties_that_overlap_become_one():
    assert tied_groups("abcd", [("a", "b"), ("d", "b")]) == [("a", "b", "d"), ("c",)]
    assert tied_groups("abcd", [("a", "b"), ("c", "d"), ("d", "a")]) == [("a", "b", "c", "d")]
    assert tied_groups("ab", []) == [("a",), ("b",)]


def test_tied_layers_that_are_pinned_apart_are_refused_by_name():
    layers = [LayerOptions("q", {2: 1}, {2: 1.0}), LayerOptions("k", {3: 1}, {3: 1.0})]
    with pytest.raises(AllocationError, match=r"q \(2\), k \(3\)"):
        allocate(layers, [("q", "k")], 100)


def test_a_model_of_eighty_blocks_takes_seconds_and_is_solved_to_the_byte(capfd):
    """560 linears of a 70B model; the bound of the continuous relaxation shows how near the optimum must be."""
    chance = random.Random(0)
    shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
    layers = []
    for block in range(80):
        for kind, (rows, columns) in enumerate(shapes):
            weight = 10 ** chance.uniform(-3, 0)
            stored = {bits: rows * (columns * bits // 8 + 8 * bits + 2) for bits in (2, 3, 4, 5)}
            costs = {bits: weight * 4.0**-bits * chance.uniform(0.8, 1.2) for bits in stored}
            layers.append(LayerOptions(f"{block}.{kind}", stored, costs))
    weights = sum(rows * columns for rows, columns in shapes) * 80
    budget = int(2.75 * weights / 8)
    start = time.process_time()
    chosen = allocate(layers, [], budget)
    assert time.process_time() - start < 5
    # What is printed here would end up in the middle of the verb's own output.
    assert capfd.readouterr().out == ""
    stored = sum(layer.bytes[chosen[layer.name]] for layer in layers)
    cost = sum(layer.costs[chosen[layer.name]] for layer in layers)
    assert stored <= budget
    assert cost >= (bound := relaxation(layers, budget))
    assert cost <= bound * 1.001
    start = time.process_time()
    back = allocate_smallest(layers, [], cost)
    assert time.process_time() - start < 30
    assert sum(layer.costs[back[layer.name]] for layer in layers) <= cost * (1 + 1e-12)
    # What is best for so many bytes is (as good as) smallest for what it loses.
    assert stored * 0.9999 <= sum(layer.bytes[back[layer.name]] for layer in layers) <= stored


def relaxation(layers, budget):
    """The best Lagrangian bound on the cost, by bisection over the price of a byte."""
    low, high, best = 0.0, 1.0, 0.0
    for _ in range(200):
        price = (low + high) / 2
        picks = [
            min(layer.bytes, key=lambda bits, layer=layer: layer.costs[bits] + price * layer.bytes[bits])
            for layer in layers
        ]
        stored = sum(layer.bytes[bits] for layer, bits in zip(layers, picks, strict=True))
        cost = sum(layer.costs[bits] for layer, bits in zip(layers, picks, strict=True))
        best = max(best, cost + price * (stored - budget))
        low, high = (price, high) if stored > budget else (low, price)
    return best
