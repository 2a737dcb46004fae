"""What was measured is found again by its fingerprints, and only by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiftadd_cli.allocation.cache import SensitivityCache, cache_folder
from shiftadd_cli.allocation.sensitivity import Sensitivities

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
