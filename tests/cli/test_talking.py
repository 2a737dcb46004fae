"""--quiet leaves only results, warnings and errors; --verbose adds details that help to find a fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from tiny_models import save_tiny

from shiftadd_cli import cli
from shiftadd_cli.errors import ArtifactError
from shiftadd_cli.progress import progress
from shiftadd_cli.verbosity import tell

QUICK = ["--samples", "2", "--seq-len", "32", "--refine-rounds", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("source") / "model")


def shiftadd(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def talkative(monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
    """Replace every verb by one that writes in every way there is."""

    @click.command()
    def quantize() -> None:
        tell("A plan.")
        for _ in progress(range(3), 3, "Working"):
            pass
        click.echo("A result.")
        if failure is not None:
            raise failure

    cli.add_talk_options(quantize)
    monkeypatch.setattr(cli._Group, "get_command", lambda self, ctx, name: quantize)


def test_quiet_leaves_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    talkative(monkeypatch)
    loud, quiet = shiftadd("quantize"), shiftadd("quantize", "--quiet")
    assert loud.stdout == quiet.stdout == "A result.\n"
    assert "A plan." in loud.stderr
    assert "Working: 3/3" in loud.stderr
    assert quiet.stderr == ""
    assert shiftadd("quantize").stderr == loud.stderr, "--quiet must not carry over to the next command"


def test_quiet_leaves_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    talkative(monkeypatch, ArtifactError("It is damaged; copy it again."))
    result = shiftadd("quantize", "-q")
    assert (result.exit_code, result.stderr) == (2, "Error: It is damaged; copy it again.\n")


def test_verbose_shows_the_traceback_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    talkative(monkeypatch, ArtifactError("It is damaged; copy it again."))
    result = shiftadd("quantize", "-v")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "raise failure" in result.stderr
    assert result.stderr.endswith("Error: It is damaged; copy it again.\n")


def test_quiet_and_verbose_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    talkative(monkeypatch)
    for both in (["-q", "-v"], ["-v", "-q"]):
        result = shiftadd("quantize", *both)
        assert result.exit_code == 2
        assert "contradict each other" in result.stderr


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_both_options(verb: str) -> None:
    text = shiftadd(verb, "--help").stdout
    assert "-q, --quiet" in text
    assert "-v, --verbose" in text


def test_quiet_run_prints_only_the_summary(model: Path, tmp_path: Path) -> None:
    """In a process of its own, where libraries may write messages too."""
    command = [sys.executable, "-m", "shiftadd_cli", "quantize", model, "-o", tmp_path / "out", "--quiet", *QUICK]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Bits/weight" in result.stdout


def test_quiet_dry_run_prints_the_plan(model: Path, tmp_path: Path) -> None:
    result = shiftadd("quantize", model, "-o", tmp_path / "out", "--dry-run", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "14 linear layers to quantize" in result.stdout


def test_verbose_raises_the_verbosity_of_libraries_for_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []

    @click.command()
    def quantize() -> None:
        levels.append((os.environ.get("TRANSFORMERS_VERBOSITY"), os.environ.get("HF_HUB_VERBOSITY")))

    cli.add_talk_options(quantize)
    monkeypatch.setattr(cli._Group, "get_command", lambda self, ctx, name: quantize)
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.setenv("HF_HUB_VERBOSITY", "error")
    for arguments in ([], ["-v"], []):
        assert shiftadd("quantize", *arguments).exit_code == 0
    assert levels == [(None, "error"), ("info", "error"), (None, "error")]
