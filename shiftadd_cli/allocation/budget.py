"""The budget that a user gives: an upper limit on the storage of the layers or of the file, or on the loss."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from shiftadd_cli.errors import AllocationError
from shiftadd_cli.sizes import parse_size

_CURVE = re.compile(r"([0-9]+(?:\.[0-9]+)?):([0-9]+(?:\.[0-9]+)?):([0-9]+(?:\.[0-9]+)?)")
# More points add no information.
_LONGEST_CURVE = 200


@dataclass(frozen=True)
class Budget:
    """One of `average_bits`, stored bits per weight of the quantized layers including scales and all overhead,
    `file_bytes`, the size of all weight files, `file_bits`, the same per parameter of the model, and `divergence`, the
    predicted loss in nats per token. `text` is the budget in the user's words."""

    text: str
    average_bits: float | None = None
    file_bytes: int | None = None
    divergence: float | None = None
    file_bits: float | None = None

    @classmethod
    def parse(
        cls,
        average_bits: float | None = None,
        target_size: str | None = None,
        max_divergence: float | None = None,
        average_file_bits: float | None = None,
    ) -> Budget:
        """The budget from the command-line options, of which exactly one must be given. Raises AllocationError."""
        options = (average_bits, average_file_bits, target_size, max_divergence)
        if sum(option is not None for option in options) != 1:
            raise AllocationError(
                "A budget needs exactly one limit; give one of `avg_bits`, `avg_file_bits`, `target_size` and "
                "`max_divergence`."
            )
        if max_divergence is not None:
            if not (math.isfinite(max_divergence) and max_divergence > 0):
                raise AllocationError(
                    f"`max_divergence` {max_divergence} is not valid; give a number of nats per token above 0, such as "
                    "0.05."
                )
            return cls(f"{max_divergence:g} nats/token of predicted loss", divergence=max_divergence)
        for name, bits in (("avg_bits", average_bits), ("avg_file_bits", average_file_bits)):
            if bits is not None and not (math.isfinite(bits) and bits > 0):
                raise AllocationError(f"`{name}` {bits} is not valid; give a number above 0, such as 2.5.")
        if average_bits is not None:
            return cls(f"{average_bits:g} bits per weight", average_bits=average_bits)
        if average_file_bits is not None:
            return cls(f"{average_file_bits:g} bits per weight over the whole file", file_bits=average_file_bits)
        assert target_size is not None
        size = parse_size(target_size)
        if size is None:
            raise AllocationError(f"`target_size` {target_size!r} is not valid; give a size such as 70MB or 1.5GB.")
        return cls(target_size, file_bytes=size)

    def file_limit(self, parameters: int) -> int | None:
        """Upper limit on the size of the weight files of a model; None for a budget that does not limit it."""
        return self.file_bytes if self.file_bits is None else math.floor(self.file_bits * parameters / 8)

    def layer_bytes(self, weights: int, other_bytes: int, parameters: int) -> int:
        """Bytes available for quantized layers with `weights` weights, given `other_bytes` of other file content and
        the number of parameters of the model.

        Only for storage budgets, not for divergence.
        """
        if self.average_bits is not None:
            return math.floor(self.average_bits * weights / 8)
        limit = self.file_limit(parameters)
        assert limit is not None, "a divergence limits no bytes"
        return limit - other_bytes

    def in_words(self, layer_bytes: int, weights: int, other_bytes: int, parameters: int) -> str:
        """Bytes of the quantized layers in the unit of this budget, rounded up so that the stated number suffices."""
        if self.average_bits is not None:
            return f"{math.ceil(8000 * layer_bytes / weights) / 1000:.3f} bits per weight"
        total = layer_bytes + other_bytes
        if self.file_bits is not None:
            return f"{math.ceil(8000 * total / parameters) / 1000:.3f} bits per weight over the whole file"
        return f"{math.ceil(total / 1000) / 1000:.3f} MB"


def parse_curve(text: str) -> list[Budget]:
    """Budgets of 2, 2.25, ... 4 stored bits per weight from `2:4:0.25`. Raises AllocationError."""
    match = _CURVE.fullmatch(text)
    # Integer millionths: 0.1 has no exact binary form, and the range must include its end.
    first, last, step = (round(1e6 * float(part)) for part in match.groups()) if match else (0, 0, 0)
    if not 0 < first <= last or step <= 0 or (last - first) // step >= _LONGEST_CURVE:
        raise AllocationError(
            f"`curve` {text!r} is not valid; give FIRST:LAST:STEP in bits per weight, such as 2:4:0.25, for at most "
            f"{_LONGEST_CURVE} points."
        )
    return [Budget.parse(point / 1e6) for point in range(first, last + 1, step)]
