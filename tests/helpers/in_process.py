"""Commands that benchmarks start as processes of their own, carried out in the test's: that spares them the imports."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import pytest
from click.testing import CliRunner
from experiments.quality import making

from shiftadd_cli.cli import main as shiftadd


def in_process(
    patch: pytest.MonkeyPatch, mains: Mapping[str, Callable[[list[str]], None]] | None = None
) -> list[list[str]]:
    """Let `python -m MODULE ARGUMENTS` of a benchmark run here: of `shiftadd_cli`, and of the modules that `mains` has
    the main function of. Lists the commands, the module first."""
    commands: list[list[str]] = []

    def run(command: list[str], *, stdout: BinaryIO, **_: Any) -> subprocess.CompletedProcess[bytes]:
        option, module, *rest = command[1:]
        assert option == "-m"
        commands.append([module, *rest])
        if module != "shiftadd_cli":
            assert mains is not None, f"nobody expected {module}"
            mains[module](rest)
            return subprocess.CompletedProcess(command, 0)
        done = CliRunner().invoke(shiftadd, rest)
        stdout.write(done.output.encode())
        return subprocess.CompletedProcess(command, done.exit_code)

    patch.setattr(making.subprocess, "run", run)
    return commands
