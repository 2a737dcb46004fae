"""A calibration text with several parts: `self:0.7,builtin:0.2,notes.txt:0.1`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shiftadd_cli.errors import CalibrationError

Kind = Literal["documents", "conversations"]
# The default: a text that the model writes itself. A vision model writes none and gets suitable pictures instead, see
# `images.load_images`.
SELF = "self"
# Names of such texts, and the kinds of windows that alternate in them.
KINDS: dict[str, tuple[Kind, ...]] = {
    SELF: ("documents", "conversations"),
    "self-plain": ("documents",),
    "self-chat": ("conversations",),
}

_PART = re.compile(r"(?P<spec>.+):(?P<share>[0-9]*\.?[0-9]+)", flags=re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A text by name or path, and its share of the windows, above 0 and at most 1."""

    spec: str
    share: float


def is_mixture(spec: str) -> bool:
    """Whether this specifies several texts, each with a share."""
    parts = spec.split(",")
    return not Path(spec).exists() and len(parts) > 1 and all(_PART.fullmatch(part.strip()) for part in parts)


def parse_mixture(spec: str) -> tuple[Part, ...]:
    """The parts of a calibration text as a user writes it, in order; a single text is one part.

    A mixture is a comma-separated list of `TEXT:SHARE`; shares are relative to their sum. The path of an existing file
    always means that file, whatever characters it contains.

    Raises:
        CalibrationError: a part has no share, a share is 0, or a text is named twice.
    """
    single = _PART.fullmatch(spec)
    if Path(spec).exists() or ("," not in spec and single is None):
        return (Part(spec, 1.0),)
    shares: dict[str, float] = {}
    for text in spec.split(","):
        match = _PART.fullmatch(text.strip())
        if match is None:
            raise CalibrationError(
                f"{text.strip()!r} in the calibration text {spec!r} has no share; write each part as TEXT:SHARE, such "
                "as self:0.7,builtin:0.3."
            )
        name, share = match["spec"].strip(), float(match["share"])
        if not 0 < share < math.inf:
            raise CalibrationError(f"The share of {name} in the calibration text is {share:g}; give one above 0.")
        if name in shares:
            raise CalibrationError(f"{name} is in the calibration text {spec!r} twice; give it one share.")
        shares[name] = share
    total = sum(shares.values())
    return tuple(Part(name, share / total) for name, share in shares.items())


def text_of_shares(shares: Mapping[str, float]) -> str:
    """The calibration text as a user would write it, from shares by text; `parse_mixture` reads it back."""
    if len(shares) == 1:
        return next(iter(shares))
    return ",".join(f"{name}:{share:.6f}" for name, share in shares.items())


def parts_with_windows(spec: str, samples: int) -> list[tuple[Part, int]]:
    """The parts of a calibration text, and the number of windows that each contributes to `samples`.

    Raises CalibrationError as `parse_mixture` and `window_counts` do.
    """
    parts = parse_mixture(spec)
    return list(zip(parts, window_counts(parts, samples), strict=True))


def window_counts(parts: tuple[Part, ...], samples: int) -> list[int]:
    """The number of windows per part, `samples` in total: by share, rounded by largest remainder.

    Raises:
        CalibrationError: a part gets no window.
    """
    exact = [part.share * samples for part in parts]
    counts = [math.floor(value + 1e-9) for value in exact]
    remainders = sorted(range(len(parts)), key=lambda index: counts[index] - exact[index])
    for index in remainders[: samples - sum(counts)]:
        counts[index] += 1
    for part, count in zip(parts, counts, strict=True):
        if not count:
            raise CalibrationError(
                f"{part.spec} gets none of {samples} calibration windows with its share of {part.share:.3g}; give it a "
                "larger share, or more `samples`."
            )
    return counts
