"""The best bits for every layer, chosen exactly: the least loss within a byte budget, or the fewest bytes within a loss
limit.

Here "bits" includes primitives: both are choices of how to store a layer, see `bcq.choices`.

One choice is made for each group of tied layers. Either the total cost is minimal while the actual stored bytes stay
within a budget, or the bytes are minimal while the total cost stays within a limit. Both are the same integer program,
a multiple-choice knapsack, with the roles exchanged; see `knapsack`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shiftadd_cli.allocation.knapsack import knapsack
from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.errors import AllocationError


@dataclass(frozen=True)
class LayerOptions:
    """The options for a layer: stored bytes and cost (predicted loss, not negative) by choice (bits, or the word of a
    shift primitive). Both have the same keys."""

    name: str
    bytes: Mapping[Choice, int]
    costs: Mapping[Choice, float]


def allocate(layers: Sequence[LayerOptions], tied: Iterable[Iterable[str]], budget: int) -> dict[str, Choice]:
    """Bits of every layer, by name: the least total cost at a total of at most `budget` bytes.

    tied: sets of names that must get equal bits; overlapping sets are merged.

    Raises AllocationError if tied layers have no bits in common, or if the budget is too small.
    """
    groups = _groups(layers, tied)
    sizes, costs = [group.bytes for group in groups], [group.costs for group in groups]
    smallest = sum(min(size.values()) for size in sizes)
    if budget < smallest:
        raise AllocationError(
            f"{budget:,} bytes for the quantized layers are too few: the allowed bits need from {smallest:,} to "
            f"{sum(max(size.values()) for size in sizes):,}; raise the budget or allow fewer bits."
        )
    return _by_name(groups, knapsack(costs, sizes, budget, lambda chosen: _bytes(groups, chosen) <= budget))


def allocate_smallest(layers: Sequence[LayerOptions], tied: Iterable[Iterable[str]], most: float) -> dict[str, Choice]:
    """Bits of every layer, by name: the fewest bytes at a total cost of at most `most`, and among choices of equal
    bytes the one of least cost. The total is computed by `math.fsum` and is never above `most`.

    tied: as for `allocate`.

    Raises AllocationError if tied layers have no bits in common, or if every choice costs more than `most`.
    """
    groups = _groups(layers, tied)
    sizes, costs = [group.bytes for group in groups], [group.costs for group in groups]
    least = _cost(groups, [min(cost, key=cost.__getitem__) for cost in costs])
    if most < least:
        largest = _cost(groups, [max(cost, key=cost.__getitem__) for cost in costs])
        raise AllocationError(
            f"A predicted loss of at most {most:g} cannot be met: with the allowed bits it is from {_above(least)} to "
            f"{_above(largest)}; raise `max_divergence`, or allow more bits with `candidates`."
        )
    chosen = knapsack(sizes, costs, most, lambda chosen: _cost(groups, chosen) <= most)
    # Blocks are identical in shape, so very many choices have the same size.
    size = _bytes(groups, chosen)
    other = knapsack(costs, sizes, size, lambda chosen: _bytes(groups, chosen) <= size)
    return _by_name(groups, min(chosen, other, key=lambda choice: _cost(groups, choice)))


def tied_groups(layers: Iterable[str], tied: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """Names in groups, ordered by first member. Overlapping tied sets form one group, and a name that is in no set
    forms its own group."""
    leader = {name: name for name in layers}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for names in tied:
        first, *others = names
        for other in others:
            leader[find(other)] = find(first)
    groups: dict[str, list[str]] = {}
    for name in leader:
        groups.setdefault(find(name), []).append(name)
    return [tuple(names) for names in groups.values()]


@dataclass(frozen=True)
class _Group:
    members: tuple[LayerOptions, ...]
    bytes: Mapping[Choice, int]
    costs: Mapping[Choice, float]


def _groups(layers: Sequence[LayerOptions], tied: Iterable[Iterable[str]]) -> list[_Group]:
    by_name = {layer.name: layer for layer in layers}
    return [_merged([by_name[name] for name in names]) for names in tied_groups(by_name, tied)]


def _merged(members: Sequence[LayerOptions]) -> _Group:
    common = [bits for bits in members[0].bytes if all(bits in member.bytes for member in members)]
    if not common:
        options = ", ".join(f"{member.name} ({'/'.join(map(str, member.bytes))})" for member in members)
        raise AllocationError(f"Tied layers have no bits in common: {options}; untie them or keep them at equal bits.")
    return _Group(
        tuple(members),
        {bits: sum(member.bytes[bits] for member in members) for bits in common},
        {bits: math.fsum(member.costs[bits] for member in members) for bits in common},
    )


def _by_name(groups: Sequence[_Group], chosen: Sequence[Choice]) -> dict[str, Choice]:
    return {member.name: bits for group, bits in zip(groups, chosen, strict=True) for member in group.members}


def _bytes(groups: Sequence[_Group], chosen: Sequence[Choice]) -> int:
    return sum(group.bytes[bits] for group, bits in zip(groups, chosen, strict=True))


def _cost(groups: Sequence[_Group], chosen: Sequence[Choice]) -> float:
    """The sum over layers, rounded once, so that it does not depend on the order of the layers."""
    return math.fsum(member.costs[bits] for group, bits in zip(groups, chosen, strict=True) for member in group.members)


def _above(cost: float) -> str:
    """To four digits, rounded up, so that a limit of the stated number can be met."""
    if cost == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(cost)) - 3)
    return next(text for extra in (0, 1, 2) if float(text := f"{(math.ceil(cost / step) + extra) * step:.4g}") >= cost)
