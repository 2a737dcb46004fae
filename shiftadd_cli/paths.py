"""Paths as a user types them, on machines where there need not be a home folder."""

from __future__ import annotations

from pathlib import Path


def expanded(path: str | Path) -> Path:
    """`path` with the home folder in place of `~`; where that is unknown, as it stands, which is what a shell does."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no HOME and no entry among the users, or a `~name` of nobody
        return Path(path)
