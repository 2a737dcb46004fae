from __future__ import annotations

import pytest

from shiftadd_cli.report.summary import bits_range, size, table


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (44_900_000, "44.9 MB"), (2_500_000_000, "2.5 GB")],
)
def test_sizes_use_decimal_units(count, text):
    assert size(count) == text


@pytest.mark.parametrize(("bits", "text"), [([3, 3], "3"), ([4, 2, 2], "2-4"), ([2, 3], "2-3")])
def test_bits_of_layers_are_one_number_or_a_range(bits, text):
    assert bits_range(bits) == text


def test_tables_align_numbers_to_the_right():
    lines = table(("layer", "bits"), [("a", "3"), ("longer", "12.5")]).splitlines()
    assert lines == ["layer   bits", "a          3", "longer  12.5"]
