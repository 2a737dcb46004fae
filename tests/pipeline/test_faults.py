"""Faults at file operations of a real process: whatever happens, the same command then ends in the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import contents, counting_text, disturbed
from tiny_models import save_tiny

QUICK = (
    "--recipe=equal-bits",
    "--samples=5",
    "--seq-len=24",
    "--batch-size=3",
    "--group-size=16",
    "--fit-rounds=1",
    "--refine-rounds=1",
)
KILLS = 5
Whole = tuple[dict[str, Any], int, int]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    place = tmp_path_factory.mktemp("source")
    model, text = save_tiny("llama", place / "model"), counting_text(place / "text.txt")
    return lambda out: ["quantize", str(model), f"--output={out}", f"--calibration={text}", "--asymmetric=0.5", *QUICK]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, command: Callable[[Path], list[str]]) -> Whole:
    """The artifact of an undisturbed run, its number of file operations, and which of them kept the first block."""
    place = tmp_path_factory.mktemp("whole")
    code, said = disturbed("", 0, command(place / "out"), place / "log")
    assert code == 0, said
    operations, kept = map(int, said.splitlines()[-1].split())
    return contents(place / "out"), operations, kept


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, command: Callable[[Path], list[str]], whole: Whole, kill: int
) -> None:
    expected, operations, _ = whole
    # One moment in each fifth of the run, the last of which renames and removes.
    moment = random.Random(kill).randint(1 + operations * kill // KILLS, operations * (kill + 1) // KILLS)
    code, said = disturbed("SIGKILL", moment, command(tmp_path / "out"), tmp_path / "log")
    assert code == -9, said
    if not (tmp_path / "out").exists():
        code, said = disturbed("", 0, command(tmp_path / "out"), tmp_path / "log")
        assert code == 0, said
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("SIGINT", 130, "blocks are finished"),
        ("SIGTERM", 143, "blocks are finished"),
        ("ENOSPC", 2, "No space left"),
        ("EACCES", 2, "No permission"),
    ],
)
def test_a_run_that_is_stopped_says_how_to_go_on_and_does(
    tmp_path: Path,
    command: Callable[[Path], list[str]],
    whole: Whole,
    fault: str,
    code: int,
    said: str,
) -> None:
    expected, _, kept = whole
    found, text = disturbed(fault, kept + 1, command(tmp_path / "out"), tmp_path / "log")
    assert found == code, text
    assert said in text
    assert "the same command continues" in text
    assert "Traceback" not in text
    assert not (tmp_path / "out").exists()
    found, text = disturbed("", 0, command(tmp_path / "out"), tmp_path / "log")
    assert found == 0, text
    assert "were done before" in text
    assert contents(tmp_path / "out") == expected
