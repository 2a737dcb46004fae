"""`scripts/benchmark_speculation.py` on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmark_speculation import PROMPTS, main
from click.testing import CliRunner, Result
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model and another one of the same vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    return str(save_tiny("llama", folder / "one")), str(save_tiny("qwen3", folder / "other", seed=3))


def run(model: str, work: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, [model, "--work", str(work), *arguments])


def test_speed_has_a_row_for_every_kind_and_draft(models: tuple[str, str], tmp_path: Path) -> None:
    model, other = models
    result = run(model, tmp_path, "--draft", other, "--draft", "lookup", "--repeats", "1", "--new-tokens", "12")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["kind"], row["draft"]) for row in rows] == [
        (kind, draft) for kind in PROMPTS for draft in (other, "lookup")
    ]
    for row in rows:
        assert 0 <= row["accepted"] <= 1
        assert row["plain"] > 0
        assert row["ratio"] > 0
    assert result.output.count("lookup") == len(PROMPTS)


def test_agreement_counts_texts_that_are_the_same(models: tuple[str, str], tmp_path: Path) -> None:
    model, other = models
    text = tmp_path / "text.txt"
    text.write_text("for statement in topics: print the name of every module\n" * 20)
    sizes = ("--prompts", "6", "--prompt-tokens", "9", "--agreement-tokens", "20", "--repeats", "0")
    result = run(model, tmp_path, "--draft", model, "--draft", other, "--draft", "lookup", "--text", str(text), *sizes)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "agreement.json").read_text())
    assert [row["dtype"] for row in rows] == ["float32"] * 3 + ["bfloat16"] * 3
    assert all((row["texts"], row["same"], row["distances"]) == (6, 6, []) for row in rows[:3])
    for row in rows[3:]:
        assert len(row["distances"]) == row["texts"] - row["same"]
        # Tokens that rounding confuses are as near as rounding.
        assert all(distance < 8 for distance in row["distances"])
    assert not (tmp_path / "speed.json").exists()


def test_text_that_is_too_short_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    result = run(models[0], tmp_path, "--draft", "lookup", "--text", str(text), "--repeats", "0")
    assert result.exit_code == 2
    assert "is too short for 200 prompts of 32 tokens" in result.output
