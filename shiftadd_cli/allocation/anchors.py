"""Estimates for all linears, scaled to match measurements of a few.

An estimate that ignores the coupling of tokens and features is wrong by a factor that is similar for all linears of one
kind. For SmolLM2-135M at 2 bits, real divergence / estimate is between .4 and .8 for most value projections of
attention and between 1.3 and 2 for most gates of the MLP; at 3 and 4 bits it is the same. Uncorrected, attention would
get bits that the MLP needs. So a few linears of every kind are measured, and the estimates of the kind are multiplied
by the missing factor.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.source import LinearSpec

# Planes of the measured linears. Independent of the candidates, so that costs of candidates added later are comparable.
ANCHOR_PLANES = 2
# Measured linears per kind.
_ANCHORS_PER_KIND = 3


def choose_anchors(linears: Sequence[LinearSpec]) -> frozenset[str]:
    """Names of a few linears of each kind, spaced evenly from the first block to the last."""
    chosen = set()
    for members in _by_kind(linears).values():
        count = min(_ANCHORS_PER_KIND, len(members))
        chosen |= {members[len(members) * (2 * index + 1) // (2 * count)].name for index in range(count)}
    return frozenset(chosen)


def anchored(
    costs: Mapping[str, dict[Choice, float]],
    estimated: Mapping[str, dict[Choice, float]],
    measured: Mapping[str, dict[Choice, float]],
    linears: Sequence[LinearSpec],
) -> dict[str, dict[Choice, float]]:
    """Costs of all linears, multiplied for each kind by Σ measured / Σ estimated over its measured linears.

    costs: by name and bits; estimated: likewise, for the measured linears only. A kind without a measurement, or with a
    measured loss of zero, gets the median factor of the other kinds, or 1 if there are none.
    """
    factors = {}
    for kind, members in _by_kind(linears).items():
        both = [(spec.name, bits) for spec in members for bits in measured.get(spec.name, ())]
        estimate, loss = (sum(losses[name][bits] for name, bits in both) for losses in (estimated, measured))
        if estimate > 0 and loss > 0:
            factors[kind] = loss / estimate
    usual = statistics.median(factors.values()) if factors else 1.0
    return {
        spec.name: {bits: cost * factors.get(_kind(spec), usual) for bits, cost in costs[spec.name].items()}
        for spec in linears
    }


def _by_kind(linears: Sequence[LinearSpec]) -> dict[str, list[LinearSpec]]:
    kinds: dict[str, list[LinearSpec]] = {}
    for spec in linears:
        kinds.setdefault(_kind(spec), []).append(spec)
    return kinds


def _kind(spec: LinearSpec) -> str:
    """The path of the linear in its block, identical for all experts."""
    return re.sub(r"\d+", "*", spec.kind)
