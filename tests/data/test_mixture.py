"""Mixtures of texts are parsed, and their windows are divided among the parts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiftadd_cli.data.mixture import Part, parse_mixture, text_of_shares, window_counts
from shiftadd_cli.errors import CalibrationError

SHARES = st.lists(st.floats(min_value=0.01, max_value=100), min_size=2, max_size=6)


@pytest.mark.parametrize("spec", ["builtin", "self", "notes.txt", "a,b.txt", "C:/texts/notes.txt", "folder/a:b.txt"])
def test_a_single_text_is_one_part(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "," in spec:
        Path(spec).write_text("a single file despite its name")
    assert parse_mixture(spec) == (Part(spec, 1.0),)


def test_parts_keep_their_order_and_shares_are_relative() -> None:
    parts = parse_mixture("self:0.7, builtin:.2,notes.txt:0.1")
    assert [part.spec for part in parts] == ["self", "builtin", "notes.txt"]
    assert [part.share for part in parts] == pytest.approx([0.7, 0.2, 0.1])
    assert parse_mixture("self:3,builtin:1") == (Part("self", 0.75), Part("builtin", 0.25))
    assert parse_mixture("self:1") == (Part("self", 1.0),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("self:0.7,builtin", "'builtin' in the calibration text .* has no share"),
        ("self,builtin", "'self' in the calibration text .* has no share"),
        ("self:0,builtin:1", "The share of self in the calibration text is 0; give one above 0"),
        ("self:-1,builtin:1", "'self:-1' in the calibration text .* has no share"),
        ("self:0.5,self:0.5", "self is in the calibration text .* twice"),
        ("self:1,", "'' in the calibration text .* has no share"),
    ],
)
def test_invalid_mixtures_are_refused(spec: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        parse_mixture(spec)


@given(SHARES)
def test_a_mixture_written_as_text_is_parsed_back(shares: list[float]) -> None:
    total = sum(shares)
    share_of = {f"text{number}.txt": share / total for number, share in enumerate(shares)}
    for part, (name, share) in zip(parse_mixture(text_of_shares(share_of)), share_of.items(), strict=True):
        assert part.spec == name
        assert part.share == pytest.approx(share, abs=1e-5)


@given(SHARES, st.integers(min_value=1, max_value=2000))
def test_window_counts_add_up_and_are_rounded_shares(shares: list[float], samples: int) -> None:
    total = sum(shares)
    parts = tuple(Part(str(number), share / total) for number, share in enumerate(shares))
    if any(part.share * samples < 1 for part in parts):
        # A part with a share below one window may still get one, if its remainder is among the largest.
        with suppress(CalibrationError):
            assert all(window_counts(parts, samples))
        return
    counts = window_counts(parts, samples)
    assert sum(counts) == samples
    assert all(abs(count - part.share * samples) < 1 for count, part in zip(counts, parts, strict=True))


def test_a_part_without_a_window_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"builtin gets none of 8 calibration windows .* larger share"):
        window_counts(parse_mixture("self:0.99,builtin:0.01"), 8)
