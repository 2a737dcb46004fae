"""What a shell is told to offer, and that this takes no torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shiftadd_cli.cli import VERBS
from shiftadd_cli.recipe_file import packaged_names


def offered(*words: str) -> list[tuple[str, str]]:
    """Kinds and values that bash is given for the last of these words."""
    program = (
        "import sys\nfrom shiftadd_cli.cli import main\nmain(prog_name='shiftadd', complete_var='_SHIFTADD_COMPLETE')"
    )
    told = {
        "_SHIFTADD_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("shiftadd", *words)),
        "COMP_CWORD": str(len(words)),
    }
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        env=os.environ | told,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "| torch" not in ended.stderr
    kinds = (line.split(",", 1) for line in ended.stdout.splitlines())
    return [(kind, value) for kind, value in kinds]


def test_verbs_are_offered() -> None:
    assert {value for _, value in offered("")} == set(VERBS)
    assert offered("qu") == [("plain", "quantize")]


def test_options_are_offered() -> None:
    assert ("plain", "--recipe") in offered("quantize", "demo", "--re")


@pytest.mark.parametrize("verb", ["quantize", "allocate-bits", "evaluate", "generate", "benchmark"])
def test_models_are_the_demo_and_what_is_on_the_disk(verb: str) -> None:
    assert offered(verb, "de") == [("plain", "demo"), ("file", "de")]


def test_recipes_are_offered_by_name_and_as_files() -> None:
    found = offered("quantize", "demo", "--recipe", "shift")
    names = [name for name in packaged_names() if name.startswith("shift")]
    assert found == [*(("plain", name) for name in names), ("file", "shift")]
