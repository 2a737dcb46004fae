"""Paths as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shiftadd_cli.paths import expanded


def test_tilde_expands_to_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert expanded("~/models/x") == Path("/home/someone/models/x")
    assert expanded(Path("models/x")) == Path("models/x")


def test_tilde_of_an_unknown_user_stays_as_typed() -> None:
    assert expanded("~nosuchuser/x") == Path("~nosuchuser/x")
