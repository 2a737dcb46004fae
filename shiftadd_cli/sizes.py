"""Sizes as a user says them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?(KB|MB|GB)", flags=re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int | None:
    """Bytes of `70MB` or `1.5 GB`, in decimal units; None for what is no size."""
    match = _SIZE.fullmatch(text)
    return None if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
