"""Mixes of bits to compare at one budget: the best for a sensitivity, a random one, and equal bits for all."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from shiftadd_cli.allocation.plan_file import BitPlan
from shiftadd_cli.allocation.solve import LayerOptions
from shiftadd_cli.bcq.choices import Choice

RANDOM, UNIFORM = "random", "uniform"


@dataclass(frozen=True)
class Mix:
    """Bits of all layers for one line of the table.

    budget: stored bits per weight; planner: a sensitivity, `random` or `uniform`; predicted: total loss by sensitivity;
    place: index of its row; mixes with the same bits share one.
    """

    budget: float
    planner: str
    seed: int
    plan: BitPlan
    predicted: dict[str, float]
    place: int


def random_bits(
    layers: Sequence[LayerOptions], tied: Sequence[Sequence[str]], budget: int, seed: int
) -> dict[str, Choice]:
    """Bits of every layer by name, drawn at random until nothing more fits into `budget` bytes.

    All layers start with the fewest bits. Each step draws a group of tied layers, uniformly from those whose next
    candidate still fits, and gives it that candidate. So the mix uses as much of the budget as a planned mix.
    """
    by_name = {layer.name: layer for layer in layers}
    groups = [[by_name[name] for name in names] for names in tied]
    options = [sorted(group[0].bytes) for group in groups]
    positions = [0] * len(groups)

    def size(index: int, position: int) -> int:
        return sum(layer.bytes[options[index][position]] for layer in groups[index])

    left = budget - sum(size(index, 0) for index in range(len(groups)))
    draw = random.Random(seed)
    open_groups = list(range(len(groups)))
    while True:
        # A group that does not fit now never will: the remaining budget only shrinks.
        open_groups = [
            index
            for index in open_groups
            if positions[index] + 1 < len(options[index])
            and size(index, positions[index] + 1) - size(index, positions[index]) <= left
        ]
        if not open_groups:
            break
        index = draw.choice(open_groups)
        left -= size(index, positions[index] + 1) - size(index, positions[index])
        positions[index] += 1
    return {layer.name: options[index][positions[index]] for index, group in enumerate(groups) for layer in group}


def uniform_bits(layers: Sequence[LayerOptions], budget: int) -> dict[str, Choice] | None:
    """Equal bits for all layers, the fewest that take at least `budget` bytes; None if no candidate does."""
    for bits in sorted(set.intersection(*(set(layer.bytes) for layer in layers))):
        if sum(layer.bytes[bits] for layer in layers) >= budget:
            return {layer.name: bits for layer in layers}
    return None
