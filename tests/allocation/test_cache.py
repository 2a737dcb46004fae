"""Cached sensitivities are found by their fingerprints, and only by them."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path
from typing import Any

import pytest

from shiftadd_cli.allocation.cache import SensitivityCache
from shiftadd_cli.allocation.sensitivity import Sensitivities
from shiftadd_cli.cache import cache_folder

SENSITIVITIES = Sensitivities({"a.q": {2: 0.5, 3: 0.1}, "a.k": {2: 1e-9, 3: 0.0}}, (("a.q", "a.k"),))


def test_stored_sensitivities_are_loaded_again(tmp_path: Path) -> None:
    SensitivityCache(tmp_path, "output", "model").keep(SENSITIVITIES)
    assert SensitivityCache(tmp_path, "output", "model").load() == SENSITIVITIES
    assert len(list((tmp_path / "sensitivities").iterdir())) == 1


@pytest.mark.parametrize("other", [("paper", "model"), ("output", "another"), ("output", "model", "")])
def test_other_fingerprints_find_nothing(tmp_path: Path, other: tuple[Any, ...]) -> None:
    SensitivityCache(tmp_path, "output", "model").keep(SENSITIVITIES)
    assert SensitivityCache(tmp_path, *other).load() is None


def test_later_candidates_are_merged_with_earlier_ones(tmp_path: Path) -> None:
    cache = SensitivityCache(tmp_path, "paper", "x")
    cache.keep(SENSITIVITIES)
    merged = cache.keep(Sensitivities({"a.q": {4: 0.02}, "a.k": {4: 0.03}}, SENSITIVITIES.shared_inputs))
    assert merged.costs == {"a.q": {2: 0.5, 3: 0.1, 4: 0.02}, "a.k": {2: 1e-9, 3: 0.0, 4: 0.03}}
    merged = cache.keep(
        Sensitivities({"a.q": {"shift2-4": 0.5}, "a.k": {"shift2-4": 0.25}}, SENSITIVITIES.shared_inputs)
    )
    assert merged.costs["a.k"] == {2: 1e-9, 3: 0.0, 4: 0.03, "shift2-4": 0.25}
    assert cache.load() == merged


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"costs": 3}', '{"costs": {"a": {"x": 1}}}', "\x00"])
def test_a_damaged_file_counts_as_missing(tmp_path: Path, text: str) -> None:
    cache = SensitivityCache(tmp_path, "paper", "x")
    cache.path.write_text(text)
    assert cache.load() is None
    assert cache.keep(SENSITIVITIES) == SENSITIVITIES == cache.load()


def test_the_environment_gives_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIFTADD_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("SHIFTADD_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/shiftadd")


def unusable(tmp_path: Path, kind: str) -> Path:
    (tmp_path / "file").write_text("")
    return {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "cache", "no home": Path("~nosuchuser/x")}[
        kind
    ]


@pytest.mark.parametrize("kind", ["a file", "below a file", "no home"])
def test_an_unusable_folder_gives_one_warning_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = SensitivityCache(unusable(tmp_path, kind), "output", "model")
    assert cache.load() is None
    assert cache.keep(SENSITIVITIES) == SENSITIVITIES == cache.keep(SENSITIVITIES)
    assert cache.load() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: sensitivities cannot be kept in ")
    assert "set SHIFTADD_CACHE to a folder that you can write to" in line
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_folder_that_disappears_gives_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = SensitivityCache(tmp_path / "cache", "output", "model")
    assert not capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    assert cache.keep(SENSITIVITIES) == SENSITIVITIES
    assert capsys.readouterr().err.count("Warning: ") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may write anywhere")
def test_a_folder_without_permission_gives_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert SensitivityCache(tmp_path, "output", "model").keep(SENSITIVITIES) == SENSITIVITIES
    assert "Permission denied" in capsys.readouterr().err


def test_without_a_home_the_folder_keeps_its_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHIFTADD_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)

    def no_entry(_: int) -> None:
        raise KeyError("nobody")

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    assert cache_folder() == Path("~/.cache/shiftadd")
