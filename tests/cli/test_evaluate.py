"""`shiftadd evaluate` as a user types it: what goes to each output stream, and the refusal of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_models import save_tiny

from shiftadd_cli.cli import main
from shiftadd_cli.evaluation import compare

SHORT = ("--context", "64", "--max-tokens", "200", "--device", "cpu")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("models") / "one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("llama", tmp_path_factory.mktemp("models") / "two", seed=1))


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["evaluate", *arguments])


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_table_has_a_row_per_model_and_the_conditions(one: str, two: str) -> None:
    result = evaluate(two, one, "--against", one, *SHORT)
    assert result.exit_code == 0, result.output
    header, original, first, second = result.stdout.splitlines()[:4]
    assert cells(header)[:4] == ["model", "perplexity", "KL, nats/token", "same top token"]
    assert [cells(row)[0] for row in (original, first, second)] == [one, two, one]
    assert cells(original)[2:4] == ["-", "-"]
    assert cells(second)[2:4] == ["0.0000 ± 0.0000", "100.00%"]
    assert len({len(row) for row in (header, original, first, second)}) == 1
    assert "builtin (documentation of Python" in result.stdout
    assert "200 tokens (the first of" in result.stdout
    assert (
        "4 of 64 tokens (context), not overlapping, which begin with no special token; 196 tokens scored"
        in result.stdout
    )
    assert "in float32 on cpu" in result.stdout


def test_windows_begin_with_the_special_tokens_of_the_tokenizer(tmp_path: Path) -> None:
    model = str(save_tiny("llama", tmp_path / "model", before=("<|user|>",)))
    result = evaluate(model, *SHORT)
    assert "4 of 64 tokens (context), not overlapping, which begin with <|user|>; 200 tokens scored" in result.stdout
    other = str(save_tiny("llama", tmp_path / "other"))
    refused = evaluate(model, other, *SHORT)
    assert refused.exit_code == 2
    assert f"tokenizer of {model} puts <|user|> before a text and that of {other} nothing" in refused.stderr


def test_default_context_is_limited_to_the_positions(one: str) -> None:
    result = evaluate(one, "--max-tokens", "600", "--device", "cpu")
    assert "2 of 512 tokens (context, as many as there are positions for), not overlapping" in result.stdout


def test_standard_output_holds_only_the_json(one: str, two: str) -> None:
    result = evaluate(two, "--against", one, "--json", *SHORT)
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    assert table["models"][0]["spec"] == two
    assert table["models"][0]["kl"] > 0
    assert table["original"]["spec"] == one
    assert "Evaluating" in result.stderr


def test_dtype_can_be_chosen(one: str) -> None:
    result = evaluate(one, "--dtype", "bfloat16", *SHORT)
    assert result.exit_code == 0, result.output
    assert "in bfloat16 (stored as float32) on cpu" in result.stdout


def test_model_calibrated_on_the_test_text_gets_a_warning(one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = compare._measured
    monkeypatch.setattr(
        compare,
        "_measured",
        lambda *arguments: compare.ModelResult(measured(*arguments).info, measured(*arguments).score, True),
    )
    result = evaluate(one, *SHORT)
    assert result.exit_code == 0, result.output
    assert "was calibrated on the very data it is measured on" in result.stderr
    assert "Warning" not in result.stdout


BAD = {
    "no model": ([], "Missing argument 'MODEL...'"),
    "missing model": (["/nowhere/at/all"], "There is no model at /nowhere/at/all"),
    "missing original": (["{one}", "--against", "/nowhere"], "There is no model at /nowhere"),
    "missing file": (["{one}", "--dataset", "missing.txt"], "There is no file missing.txt"),
    "unknown text": (["{one}", "--dataset", "wikitxt2"], "did you mean wikitext2?"),
    "no network": (["{one}", "--dataset", "wikitext2"], "pass a .txt, .jsonl or .parquet file instead"),
    "context of one": (["{one}", "--context", "1"], "'--context'"),
    "context too long": (["{one}", "--context", "100000"], "is longer than the 512 positions of"),
    "no such device": (["{one}", "--device", "nonsense"], "--device nonsense"),
    "unknown dtype": (["{one}", "--dtype", "int8"], "'--dtype'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence(
    case: str, one: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[case]
    result = evaluate(*(argument.format(one=one) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not list(Path(tmp_path).iterdir())
