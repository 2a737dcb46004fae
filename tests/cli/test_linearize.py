"""`shiftadd linearize` as a user types it, and other verbs on its result."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import save_tiny

from shiftadd_cli.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `original`, and with `linear` made from it."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny("llama", folder / "original")
    result = shiftadd("linearize", folder / "original", "-o", folder / "linear", "--layers", "1", *SMALL)
    assert result.exit_code == 0, result.output
    assert f"Written to {folder / 'linear'}" in result.stdout
    assert "Linear        1 layers; 8 nearest tokens and 4 sinks keep softmax attention" in result.stdout
    return folder


SMALL = ("--window", "8", "--samples", "3", "--seq-len", "64", "--steps", "2", "--context", "100")


def shiftadd(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_inspect_and_cost_know_the_result(models: Path) -> None:
    result = shiftadd("inspect", models / "linear", "--verify")
    assert "Attention     linear in 1 layers: map exp, 8 nearest tokens, 4 sinks" in result.stdout
    assert "Verified      complete" in result.stdout
    result = shiftadd("cost", models / "linear")
    assert result.exit_code == 0, result.output
    assert "compressed layers" not in result.stdout


def test_generate_and_evaluate_run_it(models: Path) -> None:
    result = shiftadd("generate", models / "linear", "--prompt", "The for statement", "--max-new-tokens", 30)
    assert result.exit_code == 0, result.output
    assert "new 30 tokens" in result.stderr
    result = shiftadd("evaluate", models / "linear", "--against", models / "original", "--max-tokens", 500)
    assert result.exit_code == 0, result.output
    assert "KL" in result.stdout


def test_drafts_change_no_text_on_either_side(models: Path) -> None:
    sizes = ("--prompt", "The for statement", "--max-new-tokens", 60, "--dtype", "float32")
    for model, draft in (("linear", "original"), ("original", "linear")):
        plain = shiftadd("generate", models / model, *sizes)
        drafted = shiftadd("generate", models / model, *sizes, "--draft", models / draft, "--draft-tokens", 5)
        assert drafted.exit_code == 0, drafted.output
        assert drafted.stdout == plain.stdout


def test_errors_take_one_line(models: Path, tmp_path: Path) -> None:
    result = shiftadd("linearize", models / "original", "-o", tmp_path / "out", "--window", 0)
    assert (result.exit_code, result.stderr) == (2, "Error: --window 0 is not valid; give at least 1.\n")
    result = shiftadd("linearize", models / "linear", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "has linear attention already" in result.stderr
