"""Markdown that several parts share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """A table; the last `numbers` columns are aligned to the right."""
    rules = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    return "\n".join(_line(cells) for cells in (header, rules, *rows)) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
