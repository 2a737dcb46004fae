"""The codes and the stripes of the format. They must not change: checkpoints depend on them.

The masks were found by `scripts/search_trellis.py`, which measures codes on a unit Gaussian. Scales are those that fit
it best, where the search for the scales of a weight begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from shiftadd_cli.bcq.primitives.trellis.code import TrellisCode

# Rows of a stripe, except the last one of a matrix. A path that starts in state 0 has less choice in its first rows:
# with 2 bits and 3 planes, stripes of 256, 128, 64 and 32 rows have 2, 4, 8 and 16 % more error than endless ones.
STRIPE_ROWS = 256
# Binary logarithm of the states.
MEMORY = 6


@dataclass(frozen=True)
class FormatCode:
    """A code, and the scales of its planes for a unit Gaussian."""

    code: TrellisCode
    scales: tuple[float, ...]


def _entry(bits: int, masks: tuple[int, ...], scales: tuple[float, ...]) -> FormatCode:
    return FormatCode(TrellisCode(bits, MEMORY, masks), scales)


# By stored bits and computed planes.
CODES: dict[tuple[int, int], FormatCode] = {
    (1, 2): _entry(1, (0x22, 0x75), (0.483, 0.738)),
    (2, 3): _entry(2, (0xC1, 0x34, 0x62), (0.401, 0.631, 0.840)),
    (2, 4): _entry(2, (0x61, 0x04, 0x59, 0x82), (0.333, 0.416, 0.698, 0.619)),
    (3, 4): _entry(3, (0x20, 0x84, 0x111, 0x4E), (0.318, 0.478, 0.672, 0.911)),
    (3, 5): _entry(3, (0x20, 0x10E, 0x88, 0x119, 0x45), (0.276, 0.407, 0.510, 0.619, 0.789)),
    (4, 5): _entry(4, (0x122, 0x25, 0x261, 0x21C, 0xC4), (0.327, 0.492, 0.573, 0.668, 0.769)),
}
