"""A team of processes writes the bytes that one process writes, and names the process that failed."""

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
# A model and a calibration text.
Inputs = tuple[Path, Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("source")
    return save_tiny("opt", folder / "model"), counting_text(folder / "text.txt")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("mixture")
    return save_tiny("qwen3_moe", folder / "model"), counting_text(folder / "text.txt")


def arguments(source: Inputs, out: Path, *more: str) -> list[str]:
    model, text = source
    return ["quantize", str(model), f"--output={out}", f"--calibration={text}", *QUICK, *more]


def run(
    size: int, folder: Path, command_line: list[str], faults: dict[int, str] | None = None
) -> tuple[list[int], str]:
    """The exit codes, and the output of the first process."""
    lost = [rank for rank, fault in (faults or {}).items() if fault in ("hang", "SIGSTOP")]
    exit_codes = codes(team(size, command, folder / "log", command_line, faults), lost)
    return exit_codes, (folder / "log0").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, source: Inputs) -> Callable[..., dict[str, Any]]:
    """The artifact of a single process with these options, computed once."""
    artifacts: dict[tuple[str, ...], dict[str, Any]] = {}

    def artifact(*more: str) -> dict[str, Any]:
        if more not in artifacts:
            folder = tmp_path_factory.mktemp("alone")
            exit_codes, output = run(1, folder, arguments(source, folder / "out", *more))
            assert exit_codes == [0], output
            artifacts[more] = contents(folder / "out")
        return artifacts[more]

    return artifact


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (2, ()),
        (7, ("--outlier-columns=0.05",)),
        (2, ("--loss-aware=0.5", "--asymmetric=0", "--drift=1", "--embedding-bits=trellis1-4")),
        (3, ("--reconstruct-epochs=2", "--bits=2", "--distill-epochs=1")),
        (3, ("--avg-bits=4.5",)),
        (2, ("--recipe=rtn",)),
    ],
    ids=str,
)
def test_team_writes_the_bytes_of_one_process(
    tmp_path: Path,
    source: Inputs,
    alone: Callable[..., dict[str, Any]],
    size: int,
    more: tuple[str, ...],
) -> None:
    expected = alone(*more)
    exit_codes, output = run(size, tmp_path, arguments(source, tmp_path / "out", *more))
    assert exit_codes == [0] * size, output
    assert contents(tmp_path / "out") == expected
    machine = json.loads((tmp_path / "out" / "report.json").read_text())["machine"]
    assert machine["processes"] == size
    assert all((tmp_path / f"log{rank}").read_text() == "" for rank in range(1, size))


@pytest.mark.parametrize(("size", "more"), [(3, "--loss-aware=0.5"), (2, "--avg-bits=7")])
def test_team_writes_the_bytes_of_one_process_for_a_mixture(
    tmp_path: Path, mixture: Inputs, size: int, more: str
) -> None:
    """Some shards of the samples send no token to an expert."""
    artifacts = []
    for processes in (1, size):
        folder = tmp_path / str(processes)
        folder.mkdir()
        exit_codes, output = run(
            processes, folder, arguments(mixture, folder / "out", more, "--samples=4", "--batch-size=1")
        )
        assert exit_codes == [0] * processes, output
        artifacts.append(contents(folder / "out"))
    assert artifacts[0] == artifacts[1]
    counted = [layer["tokens"] for layer in artifacts[0]["report.json"]["layers"] if ".experts." in layer["name"]]
    assert sum(counted) == 2 * 2 * 3 * 4 * 24


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("SIGKILL", -9, "no longer answers"),
        ("SIGSTOP", -9, "no longer answers"),
        ("hang", -9, "did not come to an exchange"),
    ],
)
def test_failed_process_is_named_and_a_smaller_team_resumes(
    tmp_path: Path, source: Inputs, alone: Callable[..., dict[str, Any]], fault: str, code: int, words: str
) -> None:
    command_line = arguments(source, tmp_path / "out", "--team-timeout=6")
    exit_codes, output = run(3, tmp_path, command_line, {1: fault})
    assert exit_codes == [3, code, 3], output
    assert "Error: Process 1 of the team (on " in output
    assert words in output
    assert "1 of 2 blocks are finished and kept; the same command continues from there." in output
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()
    exit_codes, output = run(2, tmp_path, command_line)
    assert exit_codes == [0, 0], output
    assert "were done before" in output
    assert contents(tmp_path / "out") == alone()


def test_only_the_first_process_reports_a_refusal(tmp_path: Path, source: Inputs) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    exit_codes, output = run(2, tmp_path, arguments(source, tmp_path / "out"))
    assert exit_codes == [2, 3]
    assert output.count("Error: ") == 1
    assert "Error: " not in (tmp_path / "log1").read_text()


@pytest.mark.parametrize("sensitivity", ["output", "divergence", "paper"])
def test_team_measures_the_sensitivities_of_one_process(tmp_path: Path, source: Inputs, sensitivity: str) -> None:
    model, text = source
    plans = []
    for size in (1, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        command_line = [
            "allocate-bits",
            str(model),
            f"--output={folder / 'plan.json'}",
            f"--calibration={text}",
            *QUICK,
        ]
        exit_codes, output = run(size, folder, [*command_line, "--avg-bits=4.5", f"--sensitivity={sensitivity}"])
        assert exit_codes == [0] * size, output
        plans.append((folder / "plan.json").read_bytes())
    assert plans[0] == plans[1]


def test_team_computes_the_scores_of_one_process(tmp_path: Path, source: Inputs) -> None:
    model, text = source
    command_line = ["evaluate", str(model), f"--against={model}", f"--dataset={text}", "--context=24", "--batch-size=5"]
    scores = []
    for size in (1, 3):
        exit_codes, output = run(size, tmp_path, [*command_line, "--json"])
        assert exit_codes == [0] * size, output
        scores.append(json.loads(output[output.index("{") :]))
    for evaluation in scores:
        for score in (evaluation["original"], *evaluation["models"]):
            assert score.pop("seconds") > 0
    assert scores[0] == scores[1]


@pytest.mark.parametrize("more", ["--tasks=arc_easy", "--dataset=builtin"])
def test_tasks_for_a_single_process_are_refused(tmp_path: Path, source: Inputs, more: str) -> None:
    model = source[0] if "tasks" in more else save_tiny_vision("vit", tmp_path / "vit")
    exit_codes, output = run(2, tmp_path, ["evaluate", str(model), more])
    assert exit_codes[0] == 2
    assert "without torchrun" in output


def differing(rank: int, log: Path, command_line: list[str], other: str) -> None:
    """`command`, with one more option in the second process."""
    command(rank, log, [*command_line, other] if rank == 1 else command_line)


def test_process_with_other_options_is_refused(tmp_path: Path, source: Inputs) -> None:
    command_line = arguments(source, tmp_path / "out")
    exit_codes = codes(team(2, differing, tmp_path / "log", command_line, "--bits=2"))
    output = (tmp_path / "log0").read_text()
    assert exit_codes == [3, 2], output
    assert "Process 1 of the team" in output
    assert "another bits" in output


def test_torchrun_starts_a_team(tmp_path: Path, source: Inputs, alone: Callable[..., dict[str, Any]]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command_line = arguments(source, tmp_path / "out")
    process = subprocess.run(
        [*torchrun, "-m", "shiftadd_cli", *command_line], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "out") == alone()
