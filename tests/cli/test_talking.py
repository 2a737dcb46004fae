"""--quiet leaves results, warnings and errors; --verbose adds what helps to find a fault."""

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
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


def talkative(monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
    """In place of every verb one that says something in each way there is."""

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
    assert shiftadd("quantize").stderr == loud.stderr, "what one command was asked must not hold for the next"


def test_quiet_leaves_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    talkative(monkeypatch, ArtifactError("It is damaged; copy it again."))
    result = shiftadd("quantize", "-q")
    assert (result.exit_code, result.stderr) == (2, "Error: It is damaged; copy it again.\n")


def test_verbose_shows_where_an_error_arose(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_every_verb_has_both(verb: str) -> None:
    said = shiftadd(verb, "--help").stdout
    assert "-q, --quiet" in said
    assert "-v, --verbose" in said


def test_a_quiet_run_says_nothing_but_what_came_out(model: Path, tmp_path: Path) -> None:
    """As a process of its own, whose libraries may speak up too."""
    command = [sys.executable, "-m", "shiftadd_cli", "quantize", model, "-o", tmp_path / "out", "--quiet", *QUICK]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Bits/weight" in done.stdout


def test_of_a_dry_run_the_plan_is_the_result(model: Path, tmp_path: Path) -> None:
    result = shiftadd("quantize", model, "-o", tmp_path / "out", "--dry-run", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "14 linear layers to quantize" in result.stdout


def test_verbose_asks_libraries_to_speak_and_only_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @click.command()
    def quantize() -> None:
        seen.append((os.environ.get("TRANSFORMERS_VERBOSITY"), os.environ.get("HF_HUB_VERBOSITY")))

    cli.add_talk_options(quantize)
    monkeypatch.setattr(cli._Group, "get_command", lambda self, ctx, name: quantize)
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.setenv("HF_HUB_VERBOSITY", "error")
    for arguments in ([], ["-v"], []):
        assert shiftadd("quantize", *arguments).exit_code == 0
    assert seen == [(None, "error"), ("info", "error"), (None, "error")]
