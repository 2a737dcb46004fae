"""The best bits for every layer, chosen exactly: the least loss in so many bytes, or the fewest bytes for such a loss.

What is said of bits is true of primitives as well: each is one of the things that a layer may be, see `bcq.choices`.

One choice is made for each group of layers that are tied together. Either the sum of the layers' costs is least and the
true stored bytes of all stay within a budget, or the bytes are least and the sum of the costs stays within a limit.
Both are the same integer program, a multiple-choice knapsack, with the roles exchanged; see `knapsack`.
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
    """What a layer may be: stored bytes and cost (predicted loss, not negative) by choice (bits, or the word of a shift
    primitive). Both have the same keys."""

    name: str
    bytes: Mapping[Choice, int]
    costs: Mapping[Choice, float]


def allocate(layers: Sequence[LayerOptions], tied: Iterable[Iterable[str]], budget: int) -> dict[str, Choice]:
    """Bits of every layer, by name: the least total cost at a total of at most `budget` bytes.

    tied: sets of names that must get equal bits; sets that overlap become one.

    Raises AllocationError where tied layers have no bits in common, or where the budget is too small.
    """
    groups = _groups(layers, tied)
    sizes, costs = [group.bytes for group in groups], [group.costs for group in groups]
    smallest = sum(min(each.values()) for each in sizes)
    if budget < smallest:
        raise AllocationError(
            f"{budget:,} bytes for the quantized layers are too few: the bits allowed need from {smallest:,} to "
            f"{sum(max(each.values()) for each in sizes):,}; raise the budget or allow fewer bits."
        )
    return _by_name(groups, knapsack(costs, sizes, budget, lambda chosen: _bytes(groups, chosen) <= budget))


def allocate_smallest(layers: Sequence[LayerOptions], tied: Iterable[Iterable[str]], most: float) -> dict[str, Choice]:
    """Bits of every layer, by name: the fewest bytes at a total cost of at most `most`, and among choices of so many
    bytes the one of least cost. The total is that of `math.fsum` and is never above `most`.

    tied: as for `allocate`.

    Raises AllocationError where tied layers have no bits in common, or where no choice costs so little.
    """
    groups = _groups(layers, tied)
    sizes, costs = [group.bytes for group in groups], [group.costs for group in groups]
    least = _cost(groups, [min(each, key=each.__getitem__) for each in costs])
    if most < least:
        largest = _cost(groups, [max(each, key=each.__getitem__) for each in costs])
        raise AllocationError(
            f"A predicted loss of at most {most:g} cannot be met: with the bits allowed it is from {_above(least)} to "
            f"{_above(largest)}; raise `max_divergence`, or allow more bits with `candidates`."
        )
    chosen = knapsack(sizes, costs, most, lambda chosen: _cost(groups, chosen) <= most)
    # Blocks are alike, so very many choices have the same size.
    size = _bytes(groups, chosen)
    other = knapsack(costs, sizes, size, lambda chosen: _bytes(groups, chosen) <= size)
    return _by_name(groups, min(chosen, other, key=lambda each: _cost(groups, each)))


def tied_groups(layers: Iterable[str], tied: Iterable[Iterable[str]]) -> list[tuple[str, ...]]:
    """Names in groups, in the order of their first members: those of tied sets that overlap are one group, and a name
    in none is a group by itself."""
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
        told = ", ".join(f"{each.name} ({'/'.join(map(str, each.bytes))})" for each in members)
        raise AllocationError(f"Tied layers have no bits in common: {told}; untie them or keep them at equal bits.")
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
    """The sum over layers, rounded once: whoever adds them up in this way finds the same."""
    return math.fsum(member.costs[bits] for group, bits in zip(groups, chosen, strict=True) for member in group.members)


def _above(cost: float) -> str:
    """To four digits, rounded up: what is said to be possible is."""
    if cost == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(cost)) - 3)
    return next(text for extra in (0, 1, 2) if float(text := f"{(math.ceil(cost / step) + extra) * step:.4g}") >= cost)
