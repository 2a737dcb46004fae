"""Paths as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiftadd_cli.paths import expanded


def test_the_home_folder_takes_the_place_of_the_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert expanded("~/models/x") == Path("/home/someone/models/x")
    assert expanded(Path("models/x")) == Path("models/x")


def test_the_home_of_nobody_stays_as_typed() -> None:
    assert expanded("~nosuchuser/x") == Path("~nosuchuser/x")
