"""Random mixes fill their budget; equal bits are the nearest that are not smaller."""

from __future__ import annotations

import random

import pytest
from mixes.planning import random_bits, uniform_bits
from mixes.solver import solver_seconds, synthetic_layers

from shiftadd_cli.allocation.solve import LayerOptions

TIED = [("0", "1"), ("2",), ("3",), ("4", "5"), ("6",), ("7",)]


def layers_of(seed):
    draw = random.Random(seed)
    sizes = {str(index): draw.randint(5, 40) for index in range(8)}
    return [
        LayerOptions(name, {bits: bits * size + 3 for bits in (2, 3, 4)}, dict.fromkeys((2, 3, 4), 1.0))
        for name, size in sizes.items()
    ]


def stored(layers, bits):
    return sum(layer.bytes[bits[layer.name]] for layer in layers)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_mix_is_within_the_budget_and_nothing_more_fits(seed):
    layers = layers_of(seed)
    low, high = (stored(layers, dict.fromkeys(map(str, range(8)), bits)) for bits in (2, 4))
    budget = low + (high - low) * (seed + 1) // 10
    found = random_bits(layers, TIED, budget, seed)
    assert list(found) == sorted(found, key=int)
    assert stored(layers, found) <= budget
    for names in TIED:
        (bits,) = {found[name] for name in names}
        if bits < 4:
            assert stored(layers, {**found, **dict.fromkeys(names, bits + 1)}) > budget
    assert random_bits(layers, TIED, budget, seed) == found


def test_seeds_give_other_mixes_and_all_of_them_at_both_ends():
    layers = layers_of(0)
    low, high = (stored(layers, dict.fromkeys(map(str, range(8)), bits)) for bits in (2, 4))
    middle = {tuple(random_bits(layers, TIED, (low + high) // 2, seed).items()) for seed in range(6)}
    assert len(middle) > 3
    assert set(random_bits(layers, TIED, low, 0).values()) == {2}
    assert set(random_bits(layers, TIED, high, 0).values()) == {4}


def test_equal_bits_are_the_fewest_that_are_not_smaller():
    layers = layers_of(1)
    size = {bits: stored(layers, dict.fromkeys(map(str, range(8)), bits)) for bits in (2, 3, 4)}
    for budget, bits in ((size[2], 2), (size[2] + 1, 3), (size[4], 4)):
        assert set((uniform_bits(layers, budget) or {}).values()) == {bits}
    assert uniform_bits(layers, size[4] + 1) is None


def test_the_solver_is_timed_at_every_budget():
    layers = synthetic_layers(3, (2, 3))
    assert len(layers) == 21
    assert all(layer.costs[2] > layer.costs[3] > 0 for layer in layers)
    assert len(solver_seconds(layers, (0.2, 0.6))) == 2
