from __future__ import annotations

import pytest

from shiftadd_cli.cli.summary import table
from shiftadd_cli.sizes import size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (44_900_000, "44.9 MB"), (2_500_000_000, "2.5 GB")],
)
def test_sizes_use_decimal_units(count: int, text: str) -> None:
    assert size(count) == text


def test_tables_align_numbers_to_the_right() -> None:
    lines = table(("layer", "bits"), [("a", "3"), ("longer", "12.5")]).splitlines()
    assert lines == ["layer   bits", "a          3", "longer  12.5"]
