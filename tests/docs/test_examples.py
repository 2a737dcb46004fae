"""Runs the code on the documentation pages, with a tiny model in place of `demo`."""

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
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty folder in which everything runs."""
    monkeypatch.setenv("SHIFTADD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(page: Path, demo: str, model: str) -> int:
    """Run the blocks of a page in order, in this process, and return the number of commands and programs.

    A shell line sets a variable or starts `shiftadd`. Anything else is refused, because there is no shell to run it.
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


def test_tutorial_runs(repository: Path, work: Path) -> None:
    model = save_tiny("llama", work / "model")
    assert run(repository / "docs" / "tutorial.md", "MODEL=demo\n", f"MODEL={model}\n") > 10
    for folder in ("first", "budget", "planned", "dense"):
        assert (work / "out" / folder / "config.json").is_file()
    assert "KL" in (work / "out" / "first" / "report.html").read_text(encoding="utf-8")


def test_python_page_runs(repository: Path, work: Path) -> None:
    model = save_tiny("llama", work / "model")
    assert run(repository / "docs" / "python.md", '"demo"', f'"{model}"') == 2
    assert (work / "out" / "in-python" / "config.json").is_file()
    assert (work / "plan.json").is_file()


def test_drafts_page_runs(repository: Path, work: Path) -> None:
    model = save_tiny("llama", work / "model")
    assert run(repository / "docs" / "drafts.md", '"demo"', f'"{model}"') == 1
