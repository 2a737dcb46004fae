"""Checks in separate processes: the crash or hang of one does not stop the others."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from architectures import processes
from architectures.check import Outcome
from architectures.factory import Architecture
from architectures.processes import check_all


def _stand_in(architecture: Architecture, folder: Path) -> Outcome:
    if architecture.name == "Crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if architecture.name == "Error":
        raise RuntimeError("a defect of the check")
    if architecture.name == "Hang":
        time.sleep(60)
    (folder / "file").write_text("left behind")
    return Outcome(architecture.name, architecture.model_type, "right", 0.75, f"from {os.getpid()}")


def test_every_kind_of_ending_has_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "check", _stand_in)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = ["Crash", "Fine", "Hang", "Error", "Also"]
    began = time.monotonic()
    outcomes = {
        outcome.name: outcome
        for outcome in check_all([Architecture(name, "type", False) for name in names], jobs=2, limit_s=1.5)
    }
    assert time.monotonic() - began < 20
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "Crash": "broken", "Fine": "right", "Hang": "broken", "Error": "broken", "Also": "right",
    }  # fmt: skip
    assert "SIGKILL" in outcomes["Crash"].note
    assert "not done within" in outcomes["Hang"].note
    assert "exit code 1" in outcomes["Error"].note
    assert outcomes["Fine"].share == 0.75
    assert outcomes["Fine"].note != f"from {os.getpid()}"
    assert not list(tmp_path.iterdir())
