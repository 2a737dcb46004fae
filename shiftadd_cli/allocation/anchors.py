"""What is estimated for all linears, brought to the size of what is measured for a few.

An estimate that drops what couples tokens and features is wrong by a factor that is much alike for linears of one kind:
of SmolLM2-135M at 2 bits, real divergence / estimate is between .4 and .8 for most values of attention and between 1.3
and 2 for most gates of the MLP, and the same at 3 and 4 bits. Bits would go to attention that the MLP needs. So a few
linears of every kind are measured, and the estimates of the kind multiplied by what is missing.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from shiftadd_cli.bcq.choices import Choice
from shiftadd_cli.source import LinearSpec

# Planes of the linears that are measured, whatever candidates there are: later ones must join those measured before.
ANCHOR_PLANES = 2
# Linears of each kind that are measured.
_EACH = 3


def choose_anchors(linears: Sequence[LinearSpec]) -> frozenset[str]:
    """Names of some linears of each kind, evenly over those there are, from the first block to the last."""
    chosen = set()
    for members in _by_kind(linears).values():
        count = min(_EACH, len(members))
        chosen |= {members[len(members) * (2 * place + 1) // (2 * count)].name for place in range(count)}
    return frozenset(chosen)


def anchored(
    costs: Mapping[str, dict[Choice, float]],
    estimated: Mapping[str, dict[Choice, float]],
    measured: Mapping[str, dict[Choice, float]],
    linears: Sequence[LinearSpec],
) -> dict[str, dict[Choice, float]]:
    """Costs of all linears, those of each kind multiplied by Σ measured / Σ estimated over what of them was measured.

    costs: by name and bits; estimated: in the same way, of the linears that were measured. A kind of which nothing, or
    no loss at all, was measured gets the median factor of the others, and 1 where there are none.
    """
    factors = {}
    for kind, members in _by_kind(linears).items():
        both = [(each.name, bits) for each in members for bits in measured.get(each.name, ())]
        estimate, loss = (sum(losses[name][bits] for name, bits in both) for losses in (estimated, measured))
        if estimate > 0 and loss > 0:
            factors[kind] = loss / estimate
    usual = statistics.median(factors.values()) if factors else 1.0
    return {
        spec.name: {bits: cost * factors.get(_kind(spec), usual) for bits, cost in costs[spec.name].items()}
        for spec in linears
    }


def _by_kind(linears: Sequence[LinearSpec]) -> dict[str, list[LinearSpec]]:
    found: dict[str, list[LinearSpec]] = {}
    for spec in linears:
        found.setdefault(_kind(spec), []).append(spec)
    return found


def _kind(spec: LinearSpec) -> str:
    """Its place in a block, the same for all experts."""
    return re.sub(r"\d+", "*", spec.kind)
