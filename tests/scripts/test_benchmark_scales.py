"""`scripts/benchmark_scales.py` on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest
from benchmark_scales import Form, Row, main, unbeaten
from click.testing import CliRunner, Result
from tiny_models import save_tiny

import shiftadd_cli

QUICK = ["--samples", "4", "--seq-len", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("scales") / "model")


def run(model: Path, work: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [str(model), "--work", str(work), *QUICK, *arguments])


def test_rows_match_what_the_command_stores(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path, "--blocks", "0,1", "--bits", "2", "--formats", "pot,float", "--groups", "8,all")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "scales.json").read_text())
    assert len(rows) == 8
    for row in rows:
        out = tmp_path / "out"
        report = shiftadd_cli.quantize(
            str(model), out, "equal-bits", samples=4, seq_len=32, overwrite=True, **row["form"]
        )
        assert row["stored_bits"] == pytest.approx(report.size.bits_per_weight)
        assert 0 < row["error"] < 1
    errors = {(row["form"]["scale_format"], row["form"]["group_size"], row["form"]["offset"]): row for row in rows}
    assert errors["float", 8, False]["error"] < errors["float", "all", False]["error"]
    assert "*" in result.output


def test_shift_layers_are_listed_beside_planes(model: Path, tmp_path: Path) -> None:
    forms = ("--bits", "2", "--formats", "pot", "--groups", "16", "--offsets", "no", "--shifts", "shift1-2,shift2")
    result = run(model, tmp_path, "--blocks", "0,1", *forms)
    assert result.exit_code == 0, result.output
    rows = {row["form"]["primitive"]: row for row in json.loads((tmp_path / "scales.json").read_text())}
    assert set(rows) == {"bcq", "shift1", "shift2"}
    fields: dict[str, Any] = {"samples": 4, "seq_len": 32, "primitive": "shift2", "bits": 4}
    report = shiftadd_cli.quantize(str(model), tmp_path / "out", **fields)
    assert rows["shift2"]["stored_bits"] == pytest.approx(report.size.bits_per_weight)
    assert rows["shift2"]["error"] < rows["shift1"]["error"] < 1
    assert run(model, tmp_path, "--blocks", "0", "--shifts", "shift3").exit_code == 2


def test_errors_match_those_of_a_run(model: Path, tmp_path: Path) -> None:
    """The linears of the first block read the same inputs in both if none waits for another and the embedding stays."""
    arguments = ("--blocks", "0", "--bits", "3", "--formats", "apot2", "--groups", "16", "--offsets", "no")
    result = run(model, tmp_path, *arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "scales.json").read_text())
    settings: dict[str, Any] = {
        "recipe": "equal-bits",
        "calibration": "builtin",
        "samples": 4,
        "seq_len": 32,
        "group_size": 16,
        "true_sequential": False,
        "embedding_bits": 16,
    }
    report = shiftadd_cli.quantize(str(model), tmp_path / "out", **settings)
    errors: list[float] = []
    for layer in report.layers:
        if not layer.block:
            assert layer.output_error is not None
            errors.append(layer.output_error)
    assert row["error"] == pytest.approx(geometric_mean(errors))


def test_unbeaten_forms_have_no_better_smaller_form() -> None:
    def row(bits: float, error: float) -> Row:
        return Row(Form(2, "pot", len(f"{bits}{error}"), False, f"{bits}-{error}"), bits, error)

    rows = [row(2.1, 0.5), row(2.2, 0.4), row(2.3, 0.45), row(2.3, 0.3), row(2.4, 0.3)]
    assert unbeaten(rows) == {rows[index].form for index in (0, 1, 3, 4)}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("--blocks", "0,9"), "blocks"), (("--formats", "apot4"), "apot4"), (("--bits", "9"), "9")],
)
def test_bad_requests_are_refused(model: Path, tmp_path: Path, arguments: tuple[str, str], word: str) -> None:
    result = run(model, tmp_path / "work", *arguments)
    assert result.exit_code == 2
    assert word in result.output
    assert not (tmp_path / "work").exists()
