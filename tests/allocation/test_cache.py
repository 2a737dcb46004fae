"""What was measured is found again by its fingerprints, and only by them."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

import pytest

from shiftadd_cli.allocation.cache import SensitivityCache
from shiftadd_cli.allocation.sensitivity import Sensitivities
from shiftadd_cli.cache import cache_folder

FOUND = Sensitivities({"a.q": {2: 0.5, 3: 0.1}, "a.k": {2: 1e-9, 3: 0.0}}, (("a.q", "a.k"),))


def test_what_is_kept_is_loaded_again(tmp_path):
    SensitivityCache(tmp_path, "output", "model").keep(FOUND)
    assert SensitivityCache(tmp_path, "output", "model").load() == FOUND
    assert len(list((tmp_path / "sensitivities").iterdir())) == 1


@pytest.mark.parametrize("other", [("paper", "model"), ("output", "another"), ("output", "model", "")])
def test_other_fingerprints_find_nothing(tmp_path, other):
    SensitivityCache(tmp_path, "output", "model").keep(FOUND)
    assert SensitivityCache(tmp_path, *other).load() is None


def test_later_candidates_join_those_that_are_there(tmp_path):
    cache = SensitivityCache(tmp_path, "paper", "x")
    cache.keep(FOUND)
    whole = cache.keep(Sensitivities({"a.q": {4: 0.02}, "a.k": {4: 0.03}}, FOUND.shared_inputs))
    assert whole.costs == {"a.q": {2: 0.5, 3: 0.1, 4: 0.02}, "a.k": {2: 1e-9, 3: 0.0, 4: 0.03}}
    whole = cache.keep(Sensitivities({"a.q": {"shift2-4": 0.5}, "a.k": {"shift2-4": 0.25}}, FOUND.shared_inputs))
    assert whole.costs["a.k"] == {2: 1e-9, 3: 0.0, 4: 0.03, "shift2-4": 0.25}
    assert cache.load() == whole


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"costs": 3}', '{"costs": {"a": {"x": 1}}}', "\x00"])
def test_a_damaged_file_is_as_none(tmp_path, text):
    cache = SensitivityCache(tmp_path, "paper", "x")
    cache.path.write_text(text)
    assert cache.load() is None
    assert cache.keep(FOUND) == FOUND == cache.load()


def test_the_folder_is_that_of_the_environment(monkeypatch):
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
def test_a_folder_that_cannot_be_used_is_warned_of_once_and_stops_nothing(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    cache = SensitivityCache(unusable(tmp_path, kind), "output", "model")
    assert cache.load() is None
    assert cache.keep(FOUND) == FOUND == cache.keep(FOUND)
    assert cache.load() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Warning: sensitivities cannot be kept in ")
    assert "set SHIFTADD_CACHE to a folder that you can write to" in line
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_folder_that_goes_away_meanwhile_is_warned_of(tmp_path, capsys):
    cache = SensitivityCache(tmp_path / "cache", "output", "model")
    assert not capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache")
    assert cache.keep(FOUND) == FOUND
    assert capsys.readouterr().err.count("Warning: ") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may write anywhere")
def test_a_folder_without_permission_is_warned_of(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert SensitivityCache(tmp_path, "output", "model").keep(FOUND) == FOUND
    assert "Permission denied" in capsys.readouterr().err


def test_without_any_home_there_is_a_folder_to_be_warned_of(monkeypatch):
    monkeypatch.delenv("SHIFTADD_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["nobody"])  # as for a user without an entry
    assert cache_folder() == Path("~/.cache/shiftadd")
