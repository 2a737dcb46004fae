"""`scripts/benchmark_quality.py` on a tiny random model: rows, their reuse, and refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from benchmark_quality import main
from click.testing import CliRunner, Result
from in_process import in_process
from tiny_models import save_tiny

from shiftadd_cli.evaluation.compare import evaluate
from shiftadd_cli.evaluation.perplexity import Score

METHODS = "rtn:group_size=16,gptq:group_size=16"
CONTEXT, MAX_TOKENS = 32, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return save_tiny("llama", folder / "model")


@pytest.fixture(scope="module")
def texts(folder: Path) -> tuple[Path, Path]:
    """A calibration text and a test text."""
    names = sorted(topics)
    paths = folder / "calibration.txt", folder / "held-out.txt"
    for path, part in zip(paths, (names[:8], names[8:16]), strict=True):
        path.write_text("\n\n".join(topics[name] for name in part), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def arguments(model: Path, texts: tuple[Path, Path]) -> list[str]:
    options: dict[str, Any] = {
        "--calibration": texts[0],
        "--test": texts[1],
        "--samples": 4,
        "--seq-len": 32,
        "--context": CONTEXT,
        "--max-tokens": MAX_TOKENS,
    }
    return [str(model), *(str(part) for pair in options.items() for part in pair)]


def run(arguments: list[str], work: Path, *more: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--work", str(work), *more])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were started during the test."""
    return in_process(monkeypatch)


@pytest.fixture(scope="module")
def work(folder: Path, arguments: list[str]) -> Path:
    """The work folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        result = run(arguments, folder / "work", "--methods", METHODS, "--bits", "2,3")
    assert result.exit_code == 0, result.output
    return folder / "work"


def row_files(work: Path) -> set[str]:
    return {path.name for path in (work / "rows").iterdir()}


def refusal(result: Result) -> str:
    """The single sentence of a refused run."""
    assert result.exit_code == 2, result.output
    sentence = result.output.strip().splitlines()[-1].removeprefix("Error: ")
    assert sentence.endswith(".")
    return sentence


def test_every_method_and_width_has_a_row(work: Path) -> None:
    table = json.loads((work / "table.json").read_text())
    rows = [(row["method"], row["bits"]) for row in table["rows"]]
    rtn, gptq = METHODS.split(",")
    assert rows == [(rtn, 2), (gptq, 2), (rtn, 3), (gptq, 3)]
    assert len(row_files(work)) == len(rows) + 1
    assert list((work / "artifacts").iterdir()) == []
    markdown = (work / "table.md").read_text()
    assert [line.split(" | ")[0] for line in markdown.splitlines()[2:7]] == [
        "| original",
        *(f"| `{method}`" for method, _ in rows),
    ]
    for fragment in ("held-out: 400 tokens", "calibration.txt: gptq", "(weights only): rtn", "torch 2", "threads"):
        assert fragment in markdown


def test_rows_match_the_reports_and_the_evaluation(
    model: Path, texts: tuple[Path, Path], arguments: list[str], tmp_path: Path, started: list[list[str]]
) -> None:
    options = ("--methods", "rtn:group_size=16", "--bits", "2", "--keep-artifacts")
    assert run(arguments, tmp_path, *options).exit_code == 0
    table = json.loads((tmp_path / "table.json").read_text())
    (artifact,), (row,) = list((tmp_path / "artifacts").iterdir()), table["rows"]
    report = json.loads((artifact / "report.json").read_text())
    evaluation = evaluate(
        [str(artifact)],
        against=str(model),
        dataset=str(texts[1]),
        context=CONTEXT,
        max_tokens=MAX_TOKENS,
        show_progress=False,
    )
    score, row_score = evaluation.models[0].score, row["scores"]["held-out"]
    assert evaluation.original is not None
    original = evaluation.original.score
    assert isinstance(score, Score)
    assert isinstance(original, Score)
    for name in ("perplexity", "perplexity_error", "kl", "kl_error", "agreement"):
        assert row_score[name] == pytest.approx(getattr(score, name), rel=1e-6), name
    assert table["original"]["scores"]["held-out"]["nll"] == pytest.approx(original.nll, rel=1e-6)
    assert row["ratio"]["held-out"] == pytest.approx(score.perplexity / original.perplexity)
    assert row["seconds"] == report["seconds"]["total"]
    assert row["peak_memory_bytes"] == report["machine"]["peak_memory_bytes"]
    assert row["stored_bits"] == report["size"]["bits_per_weight"]
    assert row["file_bits"] == report["size"]["whole_file_bits_per_weight"]
    weights = sum(layer["out_features"] * layer["in_features"] for layer in report["layers"])
    groups = sum(layer["out_features"] * math.ceil(layer["in_features"] / 16) for layer in report["layers"])
    assert row["native_bits"] == pytest.approx(2 + (16 + 2) * groups / weights)
    # In our format the same groups hold two scales and an offset of 16 bits each.
    assert row["stored_bits"] >= 2 + 48 * groups / weights


def test_script_runs_from_the_command_line(repository: Path, arguments: list[str], tmp_path: Path) -> None:
    script = repository / "scripts" / "benchmark_quality.py"
    options = ["--methods", "gptq:group_size=16", "--bits", "2", "--work", str(tmp_path)]
    process = subprocess.run(
        [sys.executable, str(script), *arguments, *options], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == (tmp_path / "table.md").read_text().strip()
    (log,) = (tmp_path / "logs").iterdir()
    assert "output error" in log.read_text()


def test_finished_rows_are_reused(work: Path, arguments: list[str], started: list[list[str]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (work / "rows").iterdir()}
    table = (work / "table.md").read_text()
    result = run(arguments, work, "--methods", METHODS, "--bits", "2,3")
    assert result.exit_code == 0
    assert started == []
    assert {path: path.stat().st_mtime_ns for path in (work / "rows").iterdir()} == before
    assert (work / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("methods", "more"),
    [
        ("gptq:group_size=24", ()),
        ("gptq:group_size=16", ("--seed", "1")),
        ("gptq:group_size=16", ("--context", "48")),
        ("gptq:group_size=16", ("--max-tokens", "300")),
        ("gptq:group_size=16", ("--calibration", "builtin")),
    ],
)
def test_other_settings_add_a_row(
    work: Path, arguments: list[str], started: list[list[str]], methods: str, more: tuple[str, ...]
) -> None:
    files_before = row_files(work)
    result = run(arguments, work, "--methods", methods, "--bits", "2", *more)
    assert result.exit_code == 0, result.output
    assert len(started) == 1
    assert files_before < row_files(work)


def test_changed_model_or_text_adds_a_row(
    work: Path, model: Path, texts: tuple[Path, Path], arguments: list[str], started: list[list[str]], tmp_path: Path
) -> None:
    other = save_tiny("llama", tmp_path / "other", seed=1)
    longer = tmp_path / texts[1].name
    longer.write_text("Once more. " + texts[1].read_text())
    for old, new in ((str(model), str(other)), (str(texts[1]), str(longer))):
        changed = [new if argument == old else argument for argument in arguments]
        assert run(changed, work, "--methods", "rtn:group_size=16", "--bits", "2").exit_code == 0
    assert len(started) == 2


def test_killed_run_resumes_where_it_was(
    arguments: list[str], started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--methods", METHODS, "--bits", "2", "--together", "1")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("experiments.quality.bench.evaluate", killed)
        assert run(arguments, tmp_path, *options).exit_code != 0
    assert len(started) == 1
    assert run(arguments, tmp_path, *options).exit_code == 0
    # The first method was quantized before the kill, so only the second is quantized now.
    assert len(started) == 2
    assert len(row_files(tmp_path)) == 3


def test_failing_method_does_not_stop_the_others(
    arguments: list[str], tmp_path: Path, started: list[list[str]]
) -> None:
    options = ("--methods", "rtn:skip=nothing.like.this,rtn:group_size=16", "--bits", "2")
    result = run(arguments, tmp_path, *options)
    assert result.exit_code == 1
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["method"] for row in table["rows"]] == ["rtn:group_size=16"]
    (failed,) = table["failed"]
    assert failed["method"] == "rtn:skip=nothing.like.this"
    assert "nothing.like.this" in failed["error"]
    assert "Failed: `rtn:skip=nothing.like.this` at 2 bits" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--methods", "default:grop_size=3"], "did you mean 'group_size'"),
        (["--methods", "default:group_size=-1"], "Method default:group_size=-1: Option `group_size`"),
        (["--methods", "default:group_size"], "not of the form field=value"),
        (["--methods", "default:bits=3"], "give bit widths to --bits"),
        (["--methods", "defalt"], "did you mean 'default'"),
        (["--methods", "peer:nobody"], "There is no peer 'nobody'; there are autoround, autoround-light, gptqmodel"),
        (["--bits", "9"], "9 is not valid"),
        (["--bits", "two"], "not a list of whole numbers"),
        (["--test", "builtin", "--test", "builtin"], "same name"),
        (["--test", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistake_gives_one_sentence_before_any_work(
    arguments: list[str], tmp_path: Path, options: list[str], expected: str
) -> None:
    assert expected in refusal(run(arguments, tmp_path / "work", *options))
    assert not (tmp_path / "work").exists()


def test_calibration_text_is_refused_as_test_text(
    arguments: list[str], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    more = ("--methods", "gptq", "--test", str(texts[0]))
    assert "is the calibration text of gptq" in refusal(run(arguments, tmp_path / "work", *more))
