"""Rows on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments.quality.rows import Original, TestScore, file_name, fingerprint, read_stored, write_stored

from shiftadd_cli.errors import ShiftaddError

SETTINGS = {"context": 32, "skip": ("a", "b"), "recipe": {"bits": 2, "group_size": 64}}


def original() -> Original:
    score = TestScore(
        perplexity=None,
        perplexity_error=None,
        nll=800.5,
        kl=None,
        kl_error=None,
        agreement=None,
        tokens=10,
        scored_tokens=9,
        windows=1,
        dtype="float32",
        device="cpu",
    )
    return Original(
        settings=SETTINGS, scores={"text": score}, machine={"cores": "2"}, file_bits_per_weight=32.0, parameters=7
    )


def test_written_row_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "rows" / "one.json"
    assert read_stored(path, Original, SETTINGS) is None
    write_stored(path, original())
    stored = read_stored(path, Original, SETTINGS)
    assert stored is not None
    assert stored.scores == original().scores
    assert [file.name for file in path.parent.iterdir()] == ["one.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2", b"\xff"])
def test_file_that_is_not_a_row_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "one.json"
    path.write_bytes(content)
    with pytest.raises(ShiftaddError, match=r"one\.json is not a row of this benchmark"):
        read_stored(path, Original, SETTINGS)


def test_row_with_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    write_stored(path, original())
    with pytest.raises(ShiftaddError, match="other settings"):
        read_stored(path, Original, {**SETTINGS, "context": 64})


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one.json"
    write_stored(path, original())
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_stored(path, original().model_copy(update={"parameters": 8}))
    assert path.read_bytes() == before


def test_file_names_differ_by_settings_and_are_valid() -> None:
    other = {**SETTINGS, "recipe": {"bits": 2, "group_size": 32}}
    assert fingerprint(SETTINGS) == fingerprint(dict(reversed(list(SETTINGS.items()))))
    first, second = (file_name("../a b:c=1,d=*/e", 2, settings) for settings in (SETTINGS, other))
    assert first != second
    assert "/" not in first
    assert not first.startswith(".")
