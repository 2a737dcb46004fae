"""Runs the commands that benchmarks start as separate processes in the test's own process, which saves the imports."""

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
    """Run `python -m MODULE ARGUMENTS` of a benchmark in this process: `shiftadd_cli`, and the modules whose main
    functions are in `mains`. Returns the list of commands, the module first."""
    commands: list[list[str]] = []

    def run(command: list[str], *, stdout: BinaryIO, **_: Any) -> subprocess.CompletedProcess[bytes]:
        option, module, *rest = command[1:]
        assert option == "-m"
        commands.append([module, *rest])
        if module != "shiftadd_cli":
            assert mains is not None, f"unexpected module {module}"
            mains[module](rest)
            return subprocess.CompletedProcess(command, 0)
        done = CliRunner().invoke(shiftadd, rest)
        stdout.write(done.output.encode())
        return subprocess.CompletedProcess(command, done.exit_code)

    patch.setattr(making.subprocess, "run", run)
    return commands
