"""The best bits for every layer under a budget of bytes, as an exact integer program.

Minimise the sum of the layers' costs, with one choice for each group of layers that are tied together, subject to the
true stored bytes of all layers staying within the budget. That is a multiple-choice knapsack; HiGHS (through
`scipy.optimize.milp`) solves it to proven optimality.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from shiftadd_cli.errors import AllocationError

# HiGHS stops at an absolute gap of 1e-6: total costs are scaled to this, so that the gap is nothing.
_COST_SCALE = 1e4


@dataclass(frozen=True)
class Choices:
    """What a layer may be: stored bytes and cost (predicted loss, not negative) by bits. Both have the same keys."""

    name: str
    bytes: Mapping[int, int]
    costs: Mapping[int, float]


def allocate(layers: Sequence[Choices], tied: Iterable[Iterable[str]], budget: int) -> dict[str, int]:
    """Bits of every layer, by name: the least total cost at a total of at most `budget` bytes.

    tied: sets of names that must get equal bits; sets that overlap become one.

    Raises AllocationError where tied layers have no bits in common, or where the budget is too small.
    """
    by_name = {layer.name: layer for layer in layers}
    groups = [_merged([by_name[name] for name in names]) for names in tied_groups(by_name, tied)]
    smallest = sum(min(group.bytes.values()) for group in groups)
    if budget < smallest:
        raise AllocationError(
            f"{budget:,} bytes for the quantized layers are too few: the bits allowed need from {smallest:,} to "
            f"{sum(max(group.bytes.values()) for group in groups):,}; raise the budget or allow fewer bits."
        )
    if sum(map(_cheapest_bytes, groups)) <= budget:
        chosen = [min(group.costs, key=lambda bits: (group.costs[bits], group.bytes[bits])) for group in groups]
    else:
        chosen = _knapsack(groups, budget)
    return {name: bits for group, bits in zip(groups, chosen, strict=True) for name in group.names}


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
    names: tuple[str, ...]
    bytes: Mapping[int, int]
    costs: Mapping[int, float]


def _merged(members: Sequence[Choices]) -> _Group:
    names = tuple(member.name for member in members)
    common = [bits for bits in members[0].bytes if all(bits in member.bytes for member in members)]
    if not common:
        told = ", ".join(f"{each.name} ({'/'.join(map(str, each.bytes))})" for each in members)
        raise AllocationError(f"Tied layers have no bits in common: {told}; untie them or keep them at equal bits.")
    return _Group(
        names,
        {bits: sum(member.bytes[bits] for member in members) for bits in common},
        {bits: sum(member.costs[bits] for member in members) for bits in common},
    )


def _cheapest_bytes(group: _Group) -> int:
    """Bytes of the choice of least cost, the smaller of equal ones."""
    return min((cost, group.bytes[bits]) for bits, cost in group.costs.items())[1]


def _knapsack(groups: Sequence[_Group], budget: int) -> list[int]:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    choices = [(index, bits) for index, group in enumerate(groups) for bits in group.bytes]
    owner = np.array([index for index, _ in choices])
    costs = np.array([groups[index].costs[bits] for index, bits in choices])
    sizes = np.array([groups[index].bytes[bits] for index, bits in choices], dtype=np.int64)
    # A choice counts by what it stores and costs beyond its group's least: small numbers are safe from rounding.
    base = np.array([min(group.bytes.values()) for group in groups], dtype=np.int64)
    extra = sizes - base[owner]
    spare = budget - int(base.sum())
    largest = float(extra.max())
    least = np.array([min(group.costs.values()) for group in groups])
    regret = costs - least[owner]
    total = float(regret.sum())
    scaled = regret * (_COST_SCALE / total) if total > 0 else regret
    pick_one = csr_array((np.ones(len(choices)), (owner, np.arange(len(choices)))), shape=(len(groups), len(choices)))
    allowed = spare
    while True:
        with _standard_output_closed():
            result = milp(
                scaled,
                integrality=np.ones(len(choices)),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(pick_one, 1, 1),
                    LinearConstraint(extra.reshape(1, -1) / largest, -np.inf, allowed / largest),
                ],
                options={"mip_rel_gap": 0.0},
            )
        if result.x is None:
            raise RuntimeError(f"HiGHS gave no solution: {result.message}")
        taken = result.x > 0.5
        used = int(extra[taken].sum())
        if used <= spare:
            return [bits for (_, bits), on in zip(choices, taken, strict=True) if on]
        # The constraint holds within a millionth of the largest choice, which may be some bytes too many.
        allowed -= used - spare


@contextmanager
def _standard_output_closed() -> Iterator[None]:
    """HiGHS 1.12 leaves a debugging line on standard output now and then, whatever its options say, and it writes past
    Python's own streams."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
