"""The code on pages that is meant to be run is run, on a tiny model in place of `demo`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_tiny

_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where `shiftadd` and `python` are those under test."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, rest in (("shiftadd", " -m shiftadd_cli"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable}{rest} "$@"\n')
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(page: Path, place: Path, demo: str, model: str) -> None:
    """One shell for all of a page, so that variables hold; `demo` is replaced by a tiny model."""
    text = page.read_text(encoding="utf-8")
    assert demo in text
    script = []
    for language, code in _BLOCK.findall(text.replace(demo, model)):
        script.append(code if language == "bash" else f"python - <<'PYTHON'\n{code}PYTHON")
    assert script
    done = subprocess.run(
        ["bash", "-eu", "-c", "\n".join(script)], cwd=place, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_tutorial(repository: Path, place: Path) -> None:
    model = save_tiny("llama", place / "model")
    run(repository / "docs" / "tutorial.md", place, "MODEL=demo\n", f"MODEL={model}\n")
    for folder in ("first", "budget", "planned", "dense"):
        assert (place / "out" / folder / "config.json").is_file()
    assert "KL" in (place / "out" / "first" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_page(repository: Path, place: Path) -> None:
    model = save_tiny("llama", place / "model")
    run(repository / "docs" / "python.md", place, '"demo"', f'"{model}"')
    assert (place / "out" / "in-python" / "config.json").is_file()
    assert (place / "plan.json").is_file()
