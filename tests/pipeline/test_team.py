"""Several processes make what one makes, to the byte, and say which of them failed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stopped_runs import contents, counting_text
from team_runs import codes, command, team
from tiny_models import save_tiny
from tiny_vision import save_tiny_vision

QUICK = (
    "--recipe=equal-bits",
    "--samples=13",
    "--seq-len=24",
    "--batch-size=3",
    "--group-size=16",
    "--fit-rounds=1",
    "--refine-rounds=1",
)
Place = tuple[Path, Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = tmp_path_factory.mktemp("source")
    return save_tiny("opt", place / "model"), counting_text(place / "text.txt")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = tmp_path_factory.mktemp("mixture")
    return save_tiny("qwen3_moe", place / "model"), counting_text(place / "text.txt")


def arguments(source: Place, out: Path, *more: str) -> list[str]:
    model, text = source
    return ["quantize", str(model), f"--output={out}", f"--calibration={text}", *QUICK, *more]


def run(size: int, place: Path, given: list[str], faults: dict[int, str] | None = None) -> tuple[list[int], str]:
    """Exit codes, and what the first process said."""
    lost = [rank for rank, fault in (faults or {}).items() if fault in ("hang", "SIGSTOP")]
    found = codes(team(size, command, place / "log", given, faults), lost)
    return found, (place / "log0").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, source: Place) -> Callable[..., dict[str, Any]]:
    """The artifact that one process makes with such options."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def artifact(*more: str) -> dict[str, Any]:
        if more not in known:
            place = tmp_path_factory.mktemp("alone")
            found, said = run(1, place, arguments(source, place / "out", *more))
            assert found == [0], said
            known[more] = contents(place / "out")
        return known[more]

    return artifact


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (2, ()),
        (7, ("--outlier-columns=0.05",)),
        (2, ("--loss-aware=0.5", "--asymmetric=0")),
        (3, ("--reconstruct-epochs=2", "--bits=2", "--distill-epochs=1")),
        (3, ("--avg-bits=4.5",)),
        (2, ("--recipe=rtn",)),
    ],
    ids=str,
)
def test_a_team_makes_the_bytes_of_one_process(
    tmp_path: Path,
    source: Place,
    alone: Callable[..., dict[str, Any]],
    size: int,
    more: tuple[str, ...],
) -> None:
    expected = alone(*more)
    found, said = run(size, tmp_path, arguments(source, tmp_path / "out", *more))
    assert found == [0] * size, said
    assert contents(tmp_path / "out") == expected
    machine = json.loads((tmp_path / "out" / "report.json").read_text())["machine"]
    assert machine["processes"] == size
    assert all((tmp_path / f"log{rank}").read_text() == "" for rank in range(1, size))


@pytest.mark.parametrize(("size", "more"), [(3, "--loss-aware=0.5"), (2, "--avg-bits=7")])
def test_a_team_makes_the_bytes_of_one_process_of_a_mixture(
    tmp_path: Path, mixture: Place, size: int, more: str
) -> None:
    """Of which some shards send nothing to an expert."""
    made = []
    for each in (1, size):
        place = tmp_path / str(each)
        place.mkdir()
        found, said = run(each, place, arguments(mixture, place / "out", more, "--samples=4", "--batch-size=1"))
        assert found == [0] * each, said
        made.append(contents(place / "out"))
    assert made[0] == made[1]
    counted = [layer["tokens"] for layer in made[0]["report.json"]["layers"] if ".experts." in layer["name"]]
    assert sum(counted) == 2 * 2 * 3 * 4 * 24


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("SIGKILL", -9, "no longer answers"),
        ("SIGSTOP", -9, "no longer answers"),
        ("hang", -9, "did not come to an exchange"),
    ],
)
def test_a_process_that_fails_is_named_and_the_run_goes_on_with_others(
    tmp_path: Path, source: Place, alone: Callable[..., dict[str, Any]], fault: str, code: int, words: str
) -> None:
    given = arguments(source, tmp_path / "out", "--team-timeout=6")
    found, said = run(3, tmp_path, given, {1: fault})
    assert found == [3, code, 3], said
    assert "Error: Process 1 of the team (on " in said
    assert words in said
    assert "1 of 2 blocks are finished and kept; the same command continues from there." in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    found, said = run(2, tmp_path, given)
    assert found == [0, 0], said
    assert "were done before" in said
    assert contents(tmp_path / "out") == alone()


def test_what_the_first_refuses_it_alone_tells(tmp_path: Path, source: Place) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    found, said = run(2, tmp_path, arguments(source, tmp_path / "out"))
    assert found == [2, 3]
    assert said.count("Error: ") == 1
    assert "Error: " not in (tmp_path / "log1").read_text()


@pytest.mark.parametrize("sensitivity", ["output", "divergence", "paper"])
def test_a_team_measures_what_one_process_measures(tmp_path: Path, source: Place, sensitivity: str) -> None:
    model, text = source
    plans = []
    for size in (1, 3):
        place = tmp_path / str(size)
        place.mkdir()
        given = ["allocate-bits", str(model), f"--output={place / 'plan.json'}", f"--calibration={text}", *QUICK]
        found, said = run(size, place, [*given, "--avg-bits=4.5", f"--sensitivity={sensitivity}"])
        assert found == [0] * size, said
        plans.append((place / "plan.json").read_bytes())
    assert plans[0] == plans[1]


def test_a_team_scores_what_one_process_scores(tmp_path: Path, source: Place) -> None:
    model, text = source
    given = ["evaluate", str(model), f"--against={model}", f"--dataset={text}", "--context=24", "--batch-size=5"]
    scores = []
    for size in (1, 3):
        found, said = run(size, tmp_path, [*given, "--json"])
        assert found == [0] * size, said
        scores.append(json.loads(said[said.index("{") :]))
    for each in scores:
        for scored in (each["original"], *each["models"]):
            assert scored.pop("seconds") > 0
    assert scores[0] == scores[1]


@pytest.mark.parametrize("more", ["--tasks=arc_easy", "--dataset=builtin"])
def test_what_one_process_must_do_is_refused(tmp_path: Path, source: Place, more: str) -> None:
    model = source[0] if "tasks" in more else save_tiny_vision("vit", tmp_path / "vit")
    found, said = run(2, tmp_path, ["evaluate", str(model), more])
    assert found[0] == 2
    assert "without torchrun" in said


def differing(rank: int, log: Path, given: list[str], other: str) -> None:
    """`command`, with another option in the second process."""
    command(rank, log, [*given, other] if rank == 1 else given)


def test_a_process_with_other_options_is_refused(tmp_path: Path, source: Place) -> None:
    given = arguments(source, tmp_path / "out")
    found = codes(team(2, differing, tmp_path / "log", given, "--bits=2"))
    said = (tmp_path / "log0").read_text()
    assert found == [3, 2], said
    assert "Process 1 of the team" in said
    assert "another bits" in said


def test_torchrun_starts_a_team(tmp_path: Path, source: Place, alone: Callable[..., dict[str, Any]]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = arguments(source, tmp_path / "out")
    ended = subprocess.run([*torchrun, "-m", "shiftadd_cli", *given], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert contents(tmp_path / "out") == alone()
