"""`shiftadd evaluate --tasks` as a user types it; tests/evaluation/test_tasks.py tests the scores."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result
from tiny_models import save_tiny

from shiftadd_cli.cli import main

TASK = """
task: shiftadd_twins
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def evaluate(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["evaluate", *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("tasks")
    lines = [{"question": "One", "choices": ["and two", "or"], "label": label} for label in (0, 1)]
    (root / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (root / "task.yaml").write_text(TASK.replace("DATA", str(root / "data.jsonl")))
    save_tiny("llama", root / "model")
    return str(root)


def test_table_has_a_column_per_model_with_the_original_first(folder: str) -> None:
    model = f"{folder}/model"
    arguments = (model, "--against", model, "--tasks", "shiftadd_twins", "--task-path", folder, "--device", "cpu")
    result = evaluate(*arguments)
    assert result.exit_code == 0, result.output
    header, row = result.stdout.splitlines()[:2]
    assert header.split() == ["task", "metric", "documents", model, model]
    # Whatever the model prefers, it is right about one of the two.
    assert row.split()[0] == "shiftadd_twins"
    assert row.count("0.5000 ± 0.5000") == 2

    document = json.loads(evaluate(*arguments, "--json").stdout)
    assert [entry["scores"][0]["value"] for entry in document["models"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "nonsense_task"), "knows no task 'nonsense_task'"),
        (("--tasks", ","), "names no task"),
        (("--tasks", "piqa", "--context", "64"), "--context has no effect with --tasks; leave one of them out."),
        (("--tasks", "piqa", "--save"), "--save has no effect with --tasks; leave one of them out."),
        (("--limit", "3"), "--limit has no effect without --tasks; give --tasks too, or leave it out."),
        (("--tasks", "piqa", "--task-path", "/nowhere/at/all"), "does not exist"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(folder: str, arguments: tuple[str, ...], message: str) -> None:
    result = evaluate(f"{folder}/model", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_missing_harness_is_reported_with_the_cure(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from shiftadd_cli.evaluation import tasks

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(tasks, "version", missing)
    result = evaluate(f"{folder}/model", "--tasks", "piqa")
    assert result.exit_code == 2
    assert "pip install 'shiftadd-cli[eval]'" in result.stderr
