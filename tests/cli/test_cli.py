from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from shiftadd_cli import __version__, cli
from shiftadd_cli.errors import ArtifactError, RecipeError, ShiftaddError


def run_verb(monkeypatch: pytest.MonkeyPatch, body: Callable[[], None]) -> Result:
    """Run a verb with this body in the command group."""

    @click.command()
    def quantize() -> None:
        body()

    monkeypatch.setattr(cli._Group, "get_command", lambda self, ctx, name: quantize)
    return CliRunner().invoke(cli.main, ["quantize"])


def raiser(failure: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise failure

    return body


def test_user_errors_are_one_line_on_stderr_and_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_verb(monkeypatch, raiser(ArtifactError("The shard is cut short;\n   download it again.")))
    assert result.exit_code == ShiftaddError.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "Error: The shard is cut short; download it again.\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
    ],
)
def test_system_errors_are_one_sentence_with_the_path(monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    result = run_verb(monkeypatch, raiser(OSError(code, os.strerror(code), "/out/model.safetensors")))
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: /out/model.safetensors: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "I/O error"), ValueError("a defect"), KeyError("x")])
def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    result = run_verb(monkeypatch, raiser(failure))
    assert result.exception is failure


def test_interruption_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_verb(monkeypatch, raiser(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert result.stderr == "Interrupted.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["quantise"], "No such command 'quantise'"), (["--bits"], "No such option"), ([], "Usage:")],
)
def test_misuse_exits_2_with_the_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_version_is_printed() -> None:
    result = CliRunner().invoke(cli.main, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"shiftadd, version {__version__}\n"


def test_module_runs_as_the_command_does() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "shiftadd_cli", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"shiftadd, version {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in cli.VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from shiftadd_cli.cli import main\n"
        "try:\n"
        f"    main({arguments!r}, prog_name='shiftadd')\n"
        "except SystemExit as end:\n"
        "    heavy = sorted({'torch', 'transformers', 'numpy', 'datasets', 'accelerate'} & sys.modules.keys())\n"
        "    sys.exit(f'{end.code} {heavy}')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == "0 []"
    assert result.stdout.startswith("Usage: shiftadd")


def test_every_verb_is_in_the_help_with_a_summary() -> None:
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:")[2].strip().splitlines()
    assert {line.split()[0] for line in listed if len(line.split()) > 1} >= set(cli.VERBS)


def test_errors_name_flags_instead_of_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RecipeError("Give `seq_len=64`, `resume=False`, `allow_partial=True` or `out`; see `pip install x`, `y`.")

    monkeypatch.setattr("shiftadd_cli.pipeline.job.Job.prepare", refuse)
    result = CliRunner().invoke(cli.main, ["quantize", "demo", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    expected = "Error: Give --seq-len 64, --no-resume, --allow-partial or `out`; see `pip install x`, `y`.\n"
    assert result.stderr == expected
