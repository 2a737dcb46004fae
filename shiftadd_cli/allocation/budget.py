"""How much may be stored, as a user says it, in bytes for the quantized layers; or how much may be lost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from shiftadd_cli.errors import AllocationError
from shiftadd_cli.sizes import parse_size

_CURVE = re.compile(r"([0-9]+(?:\.[0-9]+)?):([0-9]+(?:\.[0-9]+)?):([0-9]+(?:\.[0-9]+)?)")
# More points than this say nothing more.
_LONGEST_CURVE = 200


@dataclass(frozen=True)
class Budget:
    """One of `average_bits`, stored bits per weight of the quantized layers with scales and everything counted,
    `file_bytes`, the size of all weight files, and `divergence`, the loss that is predicted, in nats a token. `text` is
    how it was said."""

    text: str
    average_bits: float | None = None
    file_bytes: int | None = None
    divergence: float | None = None

    @classmethod
    def parse(cls, average_bits: float | None, target_size: str | None, max_divergence: float | None = None) -> Budget:
        """From the options of the command line, of which exactly one must be given. Raises AllocationError."""
        if sum(each is not None for each in (average_bits, target_size, max_divergence)) != 1:
            raise AllocationError(
                "Say how much may be stored, or lost: give one of `avg_bits`, `target_size` and `max_divergence`."
            )
        if max_divergence is not None:
            if not (math.isfinite(max_divergence) and max_divergence > 0):
                raise AllocationError(
                    f"`max_divergence` {max_divergence} is not valid; give a number of nats a token above 0, such as "
                    "0.05."
                )
            return cls(f"{max_divergence:g} nats/token of predicted loss", divergence=max_divergence)
        if average_bits is not None:
            if not (math.isfinite(average_bits) and average_bits > 0):
                raise AllocationError(f"`avg_bits` {average_bits} is not valid; give a number above 0, such as 2.5.")
            return cls(f"{average_bits:g} bits per weight", average_bits=average_bits)
        assert target_size is not None
        size = parse_size(target_size)
        if size is None:
            raise AllocationError(f"`target_size` {target_size!r} is not valid; give a size such as 70MB or 1.5GB.")
        return cls(target_size, file_bytes=size)

    def layer_bytes(self, weights: int, other_bytes: int) -> int:
        """Bytes left for quantized layers of so many weights, beside so many bytes of everything else in the files.

        For budgets of storage, not of divergence.
        """
        if self.average_bits is not None:
            return math.floor(self.average_bits * weights / 8)
        assert self.file_bytes is not None
        return self.file_bytes - other_bytes

    def in_words(self, layer_bytes: int, weights: int, other_bytes: int) -> str:
        """Some bytes for the quantized layers in the unit of this budget, rounded up: what is said is enough."""
        if self.average_bits is not None:
            return f"{math.ceil(8000 * layer_bytes / weights) / 1000:.3f} bits per weight"
        return f"{math.ceil((layer_bytes + other_bytes) / 1000) / 1000:.3f} MB"


def parse_curve(text: str) -> list[Budget]:
    """`2:4:0.25` as budgets of 2, 2.25, ... 4 stored bits per weight. Raises AllocationError."""
    match = _CURVE.fullmatch(text)
    # Whole millionths: 0.1 is no binary fraction, and the end must be met.
    first, last, step = (round(1e6 * float(part)) for part in match.groups()) if match else (0, 0, 0)
    if not 0 < first <= last or step <= 0 or (last - first) // step >= _LONGEST_CURVE:
        raise AllocationError(
            f"`curve` {text!r} is not valid; give FIRST:LAST:STEP in bits per weight, such as 2:4:0.25, for at most "
            f"{_LONGEST_CURVE} points."
        )
    return [Budget.parse(point / 1e6, None) for point in range(first, last + 1, step)]
