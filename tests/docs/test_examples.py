"""The code on pages that is meant to be run is run, on a tiny model in place of `demo`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template

import pytest
from click.testing import CliRunner
from tiny_models import save_tiny

from shiftadd_cli.cli import main

_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder in which everything runs."""
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page: Path, demo: str, model: str) -> int:
    """Run the blocks of a page one after another, in this process; returns how many commands and programs there were.

    A line of a shell sets a variable or starts `shiftadd`; anything else is refused, since no shell is here to run it.
    """
    text = page.read_text(encoding="utf-8")
    assert demo in text
    variables: dict[str, str] = {}
    count = 0
    for language, code in _BLOCK.findall(text.replace(demo, model)):
        if language == "python":
            exec(compile(code, page.name, "exec"), {"__name__": "__main__"})
            count += 1
            continue
        for line in code.splitlines():
            words = shlex.split(Template(line).substitute(variables), comments=True)
            if re.fullmatch(r"[A-Z]+=\S+", words[0]):
                name, _, variables[name] = words[0].partition("=")
                continue
            assert words[0] == "shiftadd", line
            result = CliRunner().invoke(main, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
            count += 1
    return count


def test_the_tutorial(repository: Path, place: Path) -> None:
    model = save_tiny("llama", place / "model")
    assert run(repository / "docs" / "tutorial.md", "MODEL=demo\n", f"MODEL={model}\n") > 10
    for folder in ("first", "budget", "planned", "dense"):
        assert (place / "out" / folder / "config.json").is_file()
    assert "KL" in (place / "out" / "first" / "report.html").read_text(encoding="utf-8")


def test_the_python_page(repository: Path, place: Path) -> None:
    model = save_tiny("llama", place / "model")
    assert run(repository / "docs" / "python.md", '"demo"', f'"{model}"') == 2
    assert (place / "out" / "in-python" / "config.json").is_file()
    assert (place / "plan.json").is_file()
