"""The plain part of scripts/check_native.sh. Its sanitizers and emulators are for changes to the kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

has_compiler = shutil.which("cmake") is not None and shutil.which(os.environ.get("CXX", "c++")) is not None


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(repository / "scripts" / "check_native.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.skipif(not has_compiler, reason="needs CMake and a C++ compiler")
def test_kernels_pass_without_python(repository: Path, tmp_path: Path) -> None:
    process = run(repository, "--quick", "--build", str(tmp_path), "plain")
    assert process.returncode == 0, process.stdout + process.stderr
    *_, last = process.stdout.splitlines()
    assert re.fullmatch(r"[1-9]\d+ passed, 0 failed", last)
    assert "\nportable " in process.stdout


@pytest.mark.parametrize("arguments", [("everything",), ("--seed",), ("--fast",)])
def test_wrong_arguments_print_the_usage(repository: Path, arguments: tuple[str, ...]) -> None:
    process = run(repository, *arguments)
    assert process.returncode == 2
    assert process.stderr.startswith("usage: scripts/check_native.sh [--quick]")
    assert process.stdout == ""
