"""Paths as users type them, on machines that may have no home folder."""

from __future__ import annotations

from pathlib import Path


def expanded(path: str | Path) -> Path:
    """`path` with `~` expanded to the home folder; unchanged if that is unknown, as in a shell."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no HOME and no user entry, or a `~name` that does not exist
        return Path(path)
