"""Sizes in decimal units, as they are written everywhere."""

from __future__ import annotations

import pytest

from shiftadd_cli.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("70MB", 70_000_000), ("1.5 gb", 1_500_000_000), ("2KB", 2000), ("0.25MB", 250_000), ("0MB", 0)],
)
def test_sizes_are_parsed(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "70", "MB", "70 TB", "-1MB", "1e3MB", "1.MB", "9" * 20 + "GB", "70MB\n"])
def test_invalid_sizes_are_none(text: str) -> None:
    assert parse_size(text) is None
