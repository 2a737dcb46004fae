"""The command that checks architectures: its table, its page, and resuming after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import check_architectures
import pytest
from architectures.check import Outcome, Status
from architectures.factory import Architecture
from click.testing import CliRunner


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the classes that were checked."""
    names: list[str] = []

    def check_all(architectures: Sequence[Architecture], *, jobs: int, limit_s: float) -> Iterator[Outcome]:
        for architecture in architectures:
            names.append(architecture.name)
            status: Status = "broken" if architecture.name == "GPTJForCausalLM" else "right"
            yield Outcome(architecture.name, architecture.model_type, status, 0.5, "a | b")

    monkeypatch.setattr(check_architectures, "check_all", check_all)
    monkeypatch.setattr(check_architectures, "import_everything", lambda: None)
    return names


def test_command_writes_its_page_and_resumes(checked: list[str], tmp_path: Path) -> None:
    page, work = tmp_path / "page.md", tmp_path / "work.jsonl"

    def run(only: str, *more: str) -> tuple[int, str]:
        result = CliRunner().invoke(check_architectures.main, ["--only", only, "--work", str(work), *more])
        return result.exit_code, result.stdout

    code, text = run("GPTNeoX*")
    assert code == 0
    assert checked == ["GPTNeoXForCausalLM", "GPTNeoXJapaneseForCausalLM"]
    assert "| GPTNeoXForCausalLM | right | 50 % | a \\| b |" in text
    with work.open("a") as file:
        file.write('{"state": "half a l')
    code, text = run("GPT*", "--write", str(page))
    assert code == 1, "one is broken"
    assert len(checked) == len(set(checked)), "none is checked twice"
    assert set(checked) > {"GPT2LMHeadModel", "GPTJForCausalLM"}
    assert text.rstrip().endswith("1 broken.")
    assert text.split("## ", 1)[1].split("\n\n")[2] in page.read_text()


def test_outcomes_of_other_code_are_not_reused(
    checked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--only", "GPT2*", "--work", str(tmp_path / "work.jsonl")]
    CliRunner().invoke(check_architectures.main, arguments, catch_exceptions=False)
    monkeypatch.setattr("architectures.rows.code_fingerprint", lambda: "other")
    CliRunner().invoke(check_architectures.main, arguments, catch_exceptions=False)
    assert checked == ["GPT2LMHeadModel"] * 2


def test_pattern_that_matches_nothing_is_refused(checked: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(check_architectures.main, ["--only", "Nothing", "--work", str(tmp_path / "work.jsonl")])
    assert result.exit_code == 2
    assert "No class is called Nothing." in result.output
    assert not checked
