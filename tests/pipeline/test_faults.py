"""Faults at file operations of a real process: the same command, run again, ends in the same bytes."""

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
Undisturbed = tuple[dict[str, Any], int, int]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    folder = tmp_path_factory.mktemp("source")
    model, text = save_tiny("llama", folder / "model"), counting_text(folder / "text.txt")
    return lambda out: ["quantize", str(model), f"--output={out}", f"--calibration={text}", "--asymmetric=0.5", *QUICK]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, command: Callable[[Path], list[str]]) -> Undisturbed:
    """The artifact of an undisturbed run, its number of file operations, and the one that kept the first block."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output = disturbed("", 0, command(folder / "out"), folder / "log")
    assert code == 0, output
    operations, block_kept = map(int, output.splitlines()[-1].split())
    return contents(folder / "out"), operations, block_kept


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, command: Callable[[Path], list[str]], undisturbed: Undisturbed, kill: int
) -> None:
    expected, operations, _ = undisturbed
    # One moment in each fifth of the run. The last fifth renames and removes files.
    moment = random.Random(kill).randint(1 + operations * kill // KILLS, operations * (kill + 1) // KILLS)
    code, output = disturbed("SIGKILL", moment, command(tmp_path / "out"), tmp_path / "log")
    assert code == -9, output
    if not (tmp_path / "out").exists():
        code, output = disturbed("", 0, command(tmp_path / "out"), tmp_path / "log")
        assert code == 0, output
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("SIGINT", 130, "blocks are finished"),
        ("SIGTERM", 143, "blocks are finished"),
        ("ENOSPC", 2, "No space left"),
        ("EACCES", 2, "No permission"),
    ],
)
def test_stopped_run_says_how_to_resume_and_does(
    tmp_path: Path,
    command: Callable[[Path], list[str]],
    undisturbed: Undisturbed,
    fault: str,
    code: int,
    message: str,
) -> None:
    expected, _, block_kept = undisturbed
    exit_code, output = disturbed(fault, block_kept + 1, command(tmp_path / "out"), tmp_path / "log")
    assert exit_code == code, output
    assert message in output
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
    exit_code, output = disturbed("", 0, command(tmp_path / "out"), tmp_path / "log")
    assert exit_code == 0, output
    assert "were done before" in output
    assert contents(tmp_path / "out") == expected
