"""A small table of a vision model, filled and then extended, and the model of digits that it may compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_vision import main
from click.testing import CliRunner, Result
from experiments.quality import bench as bench_module
from experiments.quality.conditions import Cell
from in_process import in_process
from tiny_vision import save_pictures, save_tiny_vision
from train_digits_vit import main as train

from shiftadd_cli.evaluation.compare import evaluate
from shiftadd_cli.evaluation.compare_images import ImageEvaluation
from shiftadd_cli.evaluation.images import ImageScore


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("vision")
    model = save_tiny_vision("vit", root / "model")
    return {
        "model": str(model),
        "calibration": str(save_pictures(root / "train", 8, layout="folders", seed=1)),
        "test": str(save_pictures(root / "test", 10, layout="folders", seed=2)),
        "work": str(root / "work"),
    }


def table(folders: dict[str, str], *options: str, code: int = 0) -> Result:
    paths = ["--calibration", folders["calibration"], "--test", folders["test"], "--work", folders["work"]]
    arguments = [folders["model"], *paths, "--samples", "6", *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result


def test_rows_are_measured_once_and_the_table_grows(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    first = table(folders, "--methods", "fast", "--bits", "3")
    assert "0 of 1 rows already exist." in first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].startswith("| method | bits | bits/weight | file bits/weight | top-1 | top-5 | same top class | KL")
    assert lines[2].startswith("| original | - | - |")
    assert lines[3].startswith("| `fast` | 3 |")
    computed_bits: list[int] = []

    def spy(cell: Cell, *rest: Any) -> Path:
        computed_bits.append(cell.bits)
        return make_artifact(cell, *rest)

    make_artifact = bench_module.make_artifact
    monkeypatch.setattr(bench_module, "make_artifact", spy)
    second = table(folders, "--methods", "fast", "--bits", "3,2")
    assert "1 of 2 rows already exist." in second.stderr
    assert computed_bits == [2]
    stored_table = json.loads((tmp_path.parent / folders["work"] / "table.json").read_text())
    assert [row["bits"] for row in stored_table["rows"]] == [2, 3]
    original = evaluate([folders["model"]], dataset=folders["test"], show_progress=False).models[0].score
    assert isinstance(original, ImageScore)
    assert stored_table["original"]["scores"]["test"]["top1"] == original.top1
    assert str(tmp_path.parent) not in json.dumps(stored_table)


def test_calibration_images_are_refused_as_test_images(folders: dict[str, str]) -> None:
    result = table({**folders, "test": folders["calibration"]}, "--methods", "fast", "--bits", "3", code=2)
    assert "both the calibration set and the test" in result.stderr


def test_model_without_image_processor_is_refused_before_any_row(folders: dict[str, str], tmp_path: Path) -> None:
    model = save_tiny_vision("vit", tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    result = table({**folders, "model": str(model), "work": str(tmp_path / "work")}, "--bits", "3", code=2)
    assert "holds no image processor; put preprocessor_config.json" in result.stderr
    assert not (tmp_path / "work").exists()


def test_vit_is_trained_on_digits(tmp_path: Path) -> None:
    result = CliRunner().invoke(train, [str(tmp_path / "vit"), "--epochs", "2"])
    assert result.exit_code == 0, result.output
    evaluation = evaluate([str(tmp_path / "vit")], dataset="builtin", batch_size=100, show_progress=False)
    assert isinstance(evaluation, ImageEvaluation)
    assert evaluation.images == 500
    score = evaluation.models[0].score
    assert isinstance(score, ImageScore)
    assert score.top1 is not None
    assert f"{score.top1:.1%} of the 500" in result.stdout
    # After two epochs it is not a good model, but better than guessing.
    assert score.top1 > 0.2
