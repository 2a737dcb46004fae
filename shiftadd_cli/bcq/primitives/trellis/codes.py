"""The codes and the stripes of the format. They must not change: checkpoints depend on them.

The masks were found by `scripts/search_trellis.py`, which measures codes on a unit Gaussian. Scales are those that fit
it best, where the search for the scales of a weight begins.
"""

from __future__ import annotations

from dataclasses import dataclass

from shiftadd_cli.bcq.primitives.trellis.code import TrellisCode

# Rows of a stripe, except the last one of a matrix. A path that starts in state 0 has less choice in its first rows: at
# 2 bits, stripes of 256, 128, 64 and 32 rows have 2, 3, 6 and 13 % more error than endless ones.
STRIPE_ROWS = 256
_MEMORY = 6


@dataclass(frozen=True)
class FormatCode:
    """A code, and the scales of its planes for a unit Gaussian."""

    code: TrellisCode
    scales: tuple[float, ...]


def _entry(bits: int, masks: tuple[int, ...], scales: tuple[float, ...]) -> FormatCode:
    return FormatCode(TrellisCode(bits, _MEMORY, masks), scales)


# By stored bits and computed planes.
CODES: dict[tuple[int, int], FormatCode] = {
    (1, 2): _entry(1, (0x3A, 0x43), (0.46, 0.7)),
    (2, 3): _entry(2, (0x59, 0x16, 0xC1), (0.395, 0.640, 0.835)),
    (2, 4): _entry(2, (0x14, 0x89, 0xD1, 0xA6), (0.325, 0.391, 0.662, 0.685)),
    (3, 4): _entry(3, (0x181, 0x2, 0x124, 0x160), (0.25, 0.45, 0.5, 0.65)),
    (3, 5): _entry(3, (0x148, 0x24, 0x1FB, 0x12A, 0x78), (0.15, 0.3, 0.45, 0.5, 0.6)),
}
