"""`shiftadd report` and `shiftadd cost` as a user runs them, on the output of `quantize` and `evaluate --save`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from bit_plans import plan_for
from click.testing import CliRunner, Result
from formats import recipe_of
from tiny_models import save_tiny

from shiftadd_cli.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source`, and with `out` quantized from it by a bit plan."""
    folder = tmp_path_factory.mktemp("made")
    source = save_tiny("llama", folder / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    recipe = recipe_of(group_size=16, samples=4, seq_len=32)
    (folder / "plan.json").write_text(plan_for(source, recipe).to_json())
    options = [
        "--recipe",
        "equal-bits",
        "--samples",
        "4",
        "--seq-len",
        "32",
        "--group-size",
        "16",
        "--bit-plan",
        folder / "plan.json",
    ]
    result = run("quantize", source, "-o", folder / "out", *options)
    assert result.exit_code == 0, result.output
    return folder


def test_quantize_writes_page_and_card_and_report_writes_the_same_page(workspace: Path) -> None:
    page, card = workspace / "out" / "report.html", workspace / "out" / "README.md"
    written = page.read_bytes()
    assert b"<h2>Bits against loss</h2>" in written
    assert yaml.safe_load(card.read_text().split("---\n")[1])["license"] == "apache-2.0"
    assert json.loads((workspace / "out" / "report.json").read_text())["source"]["license"] == "apache-2.0"
    page.unlink()
    result = run("report", workspace / "out")
    assert result.exit_code == 0, result.output
    assert page.read_bytes() == written


def test_saved_evaluation_is_shown(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(workspace / "out", out)
    measured = run(
        "evaluate", out, "--against", workspace / "source", "--context", 32, "--max-tokens", 100, "--save", "--json"
    )
    assert measured.exit_code == 0, measured.output
    perplexity = json.loads(measured.stdout)["models"][0]["perplexity"]
    assert run("report", out, "-o", tmp_path / "page.html").exit_code == 0
    assert f"perplexity {perplexity:.3f}" in (tmp_path / "page.html").read_text()
    refused = run("evaluate", workspace / "source", "--save")
    assert refused.exit_code == 2
    assert "leave it out" in refused.stderr


def test_several_runs_need_a_file(workspace: Path, tmp_path: Path) -> None:
    refused = run("report", workspace / "out", workspace / "out")
    assert refused.exit_code == 2
    assert "-o" in refused.stderr
    assert run("report", workspace / "out", workspace / "out", "-o", tmp_path / "both.html").exit_code == 0
    assert "2 compressed models side by side" in (tmp_path / "both.html").read_text()
    refused = run("report", workspace / "out", "-o", tmp_path)
    assert refused.exit_code == 2
    assert "is a folder" in refused.stderr


@pytest.mark.parametrize("verb", ["report", "cost"])
def test_other_folders_are_refused(workspace: Path, verb: str) -> None:
    for folder in (workspace / "source", workspace / "absent"):
        refused = run(verb, folder)
        assert refused.exit_code == 2
        assert refused.stderr.startswith("Error: ")
        assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("text", [None, "{", '{"schema_version": 1}'])
def test_missing_or_damaged_report_is_refused(workspace: Path, tmp_path: Path, text: str | None) -> None:
    out = tmp_path / "out"
    shutil.copytree(workspace / "out", out)
    (out / "report.json").unlink()
    if text is not None:
        (out / "report.json").write_text(text)
    before = (out / "report.html").read_bytes()
    refused = run("report", out)
    assert refused.exit_code == 2
    assert "report.json" in refused.stderr
    assert (out / "report.html").read_bytes() == before


def test_cost_shows_bytes_and_energy(workspace: Path, tmp_path: Path) -> None:
    result = run("cost", workspace / "out")
    assert result.exit_code == 0, result.output
    assert "planes, by additions and shifts" in result.stdout
    document = json.loads(run("cost", workspace / "out", "--json", "--cost-table", tmp_path / "energy.json").stdout)
    assert document["layers"]["fp16"]["total_pj"] > document["layers"]["look-ups"]["total_pj"] > 0
    table = json.loads((tmp_path / "energy.json").read_text())
    assert (table["cost"], table["unit"]) == ("energy", "nJ")
    refused = run("cost", workspace / "out", "--unit-costs", tmp_path / "energy.json")
    assert refused.exit_code == 2
    assert "unit costs" in refused.stderr
