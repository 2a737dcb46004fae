"""Sizes in bytes as users write and read them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?(KB|MB|GB)", flags=re.IGNORECASE)
_FACTORS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS = ("B", "kB", "MB", "GB", "TB")


def parse_size(text: str) -> int | None:
    """Bytes of `70MB` or `1.5 GB`, in decimal units; None if `text` is not a size."""
    match = _SIZE.fullmatch(text)
    return None if match is None else int(float(match[1]) * _FACTORS[match[2].upper()])


def size(count: float) -> str:
    """A number of bytes with a decimal unit: `44.9 MB`."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"
