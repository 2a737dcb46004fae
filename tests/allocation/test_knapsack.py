"""The knapsack against exhaustive search, with numbers of very different sizes and limits met to the last bit."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Mapping, Sequence

import pytest

from shiftadd_cli.allocation import knapsack as knapsack_module
from shiftadd_cli.allocation.knapsack import knapsack

# A number for each key, by group.
Table = list[dict[int, float]]


def total(values: Sequence[Mapping[int, float]], chosen: Sequence[int]) -> float:
    return math.fsum(by_key[key] for by_key, key in zip(values, chosen, strict=True))


def solve(aims: Sequence[Mapping[int, float]], loads: Sequence[Mapping[int, float]], limit: float) -> list[int]:
    return knapsack(aims, loads, limit, lambda chosen: total(loads, chosen) <= limit)


def problem(rng: random.Random) -> tuple[Table, Table]:
    """Sizes and costs of some groups: sizes are integers, similar or from 1 to a billion, costs have 1 to 17 digits."""
    groups, keys = rng.randint(1, 6), sorted(rng.sample(range(1, 9), rng.randint(1, 3)))
    largest, alike = 10 ** rng.randint(1, 9), rng.random() < 0.5
    digits, spread = rng.choice([1, 2, 6, 17]), rng.choice([0, 1, 6])
    sizes: Table = []
    costs: Table = []
    for _ in range(groups):
        unit = largest if alike else rng.randint(1, 10 ** rng.randint(1, 9))
        sizes.append({key: unit * key + rng.randint(0, 3) for key in keys})
        scale = 10 ** -rng.uniform(0, spread)
        costs.append({key: float(f"{scale * 4.0**-key * rng.uniform(0.5, 2):.{digits}g}") for key in keys})
    return sizes, costs


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_within_the_limit_is_better(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        sizes, costs = problem(rng)
        for aims, loads in ((costs, sizes), (sizes, costs)):
            choices = [
                (total(loads, chosen), total(aims, chosen))
                for chosen in itertools.product(*(list(group) for group in aims))
            ]
            reached = rng.choice(choices)[0]
            for limit in (reached, math.nextafter(reached, 0), reached * (1 - 1e-8), reached * 1.2):
                fitting = [aim for load, aim in choices if load <= limit]
                if fitting:
                    chosen = solve(aims, loads, limit)
                    assert total(loads, chosen) <= limit
                    assert total(aims, chosen) == pytest.approx(min(fitting), rel=1e-12)


def test_few_partial_choices_give_the_same_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass only shortens the second one."""
    rng = random.Random(5)
    sizes = [{key: rng.randint(1, 1000) * key for key in (2, 3, 4)} for _ in range(40)]
    costs = [{key: rng.uniform(0.5, 2) * 4.0**-key for key in (2, 3, 4)} for _ in range(40)]
    limit = sum(group[3] for group in sizes)
    expected = total(costs, solve(costs, sizes, limit))
    for few in (1, 10):
        monkeypatch.setattr(knapsack_module, "_FEW", few)
        assert total(costs, solve(costs, sizes, limit)) == pytest.approx(expected, rel=1e-12)


def test_losses_proportional_to_sizes_end_soon_and_fill_the_limit() -> None:
    """All choices of one size are then equally good, and bounds cannot tell them apart."""
    rng = random.Random(6)
    sizes = [{key: rng.randint(10**6, 10**7) * key for key in (2, 3, 4)} for _ in range(40)]
    costs = [{key: 1.0 - 1e-8 * size for key, size in group.items()} for group in sizes]
    limit = sum(group[3] for group in sizes)
    start = time.process_time()
    chosen = solve(costs, sizes, limit)
    assert time.process_time() - start < 20
    assert limit * (1 - 1e-6) < total(sizes, chosen) <= limit
