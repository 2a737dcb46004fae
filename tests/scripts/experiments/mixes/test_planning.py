"""Random mixes fill their budget. Uniform bits are the fewest that reach it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
from experiments.mixes.planning import random_bits, uniform_bits
from experiments.mixes.solver import solver_seconds, synthetic_layers

from shiftadd_cli.allocation.solve import LayerOptions
from shiftadd_cli.bcq.choices import Choice

TIED = [("0", "1"), ("2",), ("3",), ("4", "5"), ("6",), ("7",)]


def layers_of(seed: int) -> list[LayerOptions]:
    draw = random.Random(seed)
    sizes = {str(index): draw.randint(5, 40) for index in range(8)}
    return [
        LayerOptions(name, {bits: bits * size + 3 for bits in (2, 3, 4)}, dict.fromkeys((2, 3, 4), 1.0))
        for name, size in sizes.items()
    ]


def stored(layers: Sequence[LayerOptions], bits: Mapping[str, Choice]) -> int:
    return sum(layer.bytes[bits[layer.name]] for layer in layers)


@pytest.mark.parametrize("seed", range(8))
def test_random_mix_is_within_the_budget_and_nothing_more_fits(seed: int) -> None:
    layers = layers_of(seed)
    low, high = (stored(layers, dict.fromkeys(map(str, range(8)), bits)) for bits in (2, 4))
    budget = low + (high - low) * (seed + 1) // 10
    mix = random_bits(layers, TIED, budget, seed)
    assert list(mix) == sorted(mix, key=int)
    assert stored(layers, mix) <= budget
    for names in TIED:
        (bits,) = {mix[name] for name in names}
        assert isinstance(bits, int)
        if bits < 4:
            assert stored(layers, {**mix, **dict.fromkeys(names, bits + 1)}) > budget
    assert random_bits(layers, TIED, budget, seed) == mix


def test_seeds_give_different_mixes_but_the_same_at_both_ends() -> None:
    layers = layers_of(0)
    low, high = (stored(layers, dict.fromkeys(map(str, range(8)), bits)) for bits in (2, 4))
    middle = {tuple(random_bits(layers, TIED, (low + high) // 2, seed).items()) for seed in range(6)}
    assert len(middle) > 3
    assert set(random_bits(layers, TIED, low, 0).values()) == {2}
    assert set(random_bits(layers, TIED, high, 0).values()) == {4}


def test_uniform_bits_are_the_fewest_that_reach_the_budget() -> None:
    layers = layers_of(1)
    size = {bits: stored(layers, dict.fromkeys(map(str, range(8)), bits)) for bits in (2, 3, 4)}
    for budget, bits in ((size[2], 2), (size[2] + 1, 3), (size[4], 4)):
        assert set((uniform_bits(layers, budget) or {}).values()) == {bits}
    assert uniform_bits(layers, size[4] + 1) is None


def test_solver_is_timed_at_every_budget() -> None:
    layers = synthetic_layers(3, (2, 3))
    assert len(layers) == 21
    assert all(layer.costs[2] > layer.costs[3] > 0 for layer in layers)
    assert len(solver_seconds(layers, (0.2, 0.6))) == 2
