"""Against trying everything, on numbers of very different sizes and on limits that are met to the last bit."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest

from shiftadd_cli.allocation import knapsack as knapsack_module
from shiftadd_cli.allocation.knapsack import knapsack


def total(values, chosen):
    return math.fsum(each[key] for each, key in zip(values, chosen, strict=True))


def solve(aims, loads, limit):
    return knapsack(aims, loads, limit, lambda chosen: total(loads, chosen) <= limit)


def problem(chance):
    """Groups with sizes (whole numbers, alike or from 1 to a billion) and costs of 1 to 17 digits."""
    groups, keys = chance.randint(1, 6), sorted(chance.sample(range(1, 9), chance.randint(1, 3)))
    largest, alike = 10 ** chance.randint(1, 9), chance.random() < 0.5
    digits, spread = chance.choice([1, 2, 6, 17]), chance.choice([0, 1, 6])
    sizes, costs = [], []
    for _ in range(groups):
        unit = largest if alike else chance.randint(1, 10 ** chance.randint(1, 9))
        sizes.append({key: unit * key + chance.randint(0, 3) for key in keys})
        scale = 10 ** -chance.uniform(0, spread)
        costs.append({key: float(f"{scale * 4.0**-key * chance.uniform(0.5, 2):.{digits}g}") for key in keys})
    return sizes, costs


@pytest.mark.parametrize("seed", range(4))
def test_nothing_within_the_limit_is_better(seed):
    chance = random.Random(seed)
    for _ in range(60):
        sizes, costs = problem(chance)
        for aims, loads in ((costs, sizes), (sizes, costs)):
            every = [
                (total(loads, chosen), total(aims, chosen))
                for chosen in itertools.product(*(list(each) for each in aims))
            ]
            met = chance.choice(every)[0]
            for limit in (met, math.nextafter(met, 0), met * (1 - 1e-8), met * 1.2):
                fitting = [aim for load, aim in every if load <= limit]
                if fitting:
                    chosen = solve(aims, loads, limit)
                    assert total(loads, chosen) <= limit
                    assert total(aims, chosen) == pytest.approx(min(fitting), rel=1e-12)


def test_few_partial_choices_give_the_same_as_many(monkeypatch):
    """The first pass only makes the second one short."""
    chance = random.Random(5)
    sizes = [{key: chance.randint(1, 1000) * key for key in (2, 3, 4)} for _ in range(40)]
    costs = [{key: chance.uniform(0.5, 2) * 4.0**-key for key in (2, 3, 4)} for _ in range(40)]
    limit = sum(each[3] for each in sizes)
    expected = total(costs, solve(costs, sizes, limit))
    for few in (1, 10):
        monkeypatch.setattr(knapsack_module, "_FEW", few)
        assert total(costs, solve(costs, sizes, limit)) == pytest.approx(expected, rel=1e-12)


def test_losses_that_are_proportional_to_sizes_end_soon_and_fill_the_limit():
    """Then every choice is as good as any other of its size, and bounds tell nothing apart."""
    chance = random.Random(6)
    sizes = [{key: chance.randint(10**6, 10**7) * key for key in (2, 3, 4)} for _ in range(40)]
    costs = [{key: 1.0 - 1e-8 * size for key, size in each.items()} for each in sizes]
    limit = sum(each[3] for each in sizes)
    start = time.process_time()
    chosen = solve(costs, sizes, limit)
    assert time.process_time() - start < 20
    assert limit * (1 - 1e-6) < total(sizes, chosen) <= limit
