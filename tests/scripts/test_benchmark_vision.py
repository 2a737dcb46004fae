"""A small table of a vision model, filled, cut short and gone on with; and the model of digits it may be of."""

from __future__ import annotations

import json

import pytest
from benchmark_vision import main
from click.testing import CliRunner
from in_process import in_process
from quality import bench as bench_module
from tiny_vision import save_pictures, save_tiny_vision
from train_digits_vit import main as train

from shiftadd_cli.evaluation.compare import evaluate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")
    model = save_tiny_vision("vit", root / "model")
    return {
        "model": str(model),
        "calibration": str(save_pictures(root / "train", 8, layout="folders", seed=1)),
        "test": str(save_pictures(root / "test", 10, layout="folders", seed=2)),
        "work": str(root / "work"),
    }


def table(folders, *options, code=0):
    places = ["--calibration", folders["calibration"], "--test", folders["test"], "--work", folders["work"]]
    arguments = [folders["model"], *places, "--samples", "6", *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result


def test_rows_are_measured_once_and_gone_on_with(folders, tmp_path, monkeypatch):
    in_process(monkeypatch)
    first = table(folders, "--methods", "fast", "--bits", "3")
    assert "0 of 1 rows are there already." in first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].startswith("| method | bits | bits/weight | file bits/weight | top-1 | top-5 | same top class | KL")
    assert lines[2].startswith("| original | - | - |")
    assert lines[3].startswith("| `fast` | 3 |")
    made = []
    whole = bench_module.make_artifact
    monkeypatch.setattr(bench_module, "make_artifact", lambda cell, *rest: made.append(cell.bits) or whole(cell, *rest))
    second = table(folders, "--methods", "fast", "--bits", "3,2")
    assert "1 of 2 rows are there already." in second.stderr
    assert made == [2]
    told = json.loads((tmp_path.parent / folders["work"] / "table.json").read_text())
    assert [row["bits"] for row in told["rows"]] == [2, 3]
    original = evaluate([folders["model"]], dataset=folders["test"], show_progress=False).models[0].score
    assert told["original"]["scores"]["test"]["top1"] == original.top1
    assert str(tmp_path.parent) not in json.dumps(told)


def test_the_images_calibrated_on_are_no_test(folders):
    result = table({**folders, "test": folders["calibration"]}, "--methods", "fast", "--bits", "3", code=2)
    assert "both calibrated on and the test" in result.stderr


def test_a_model_without_image_processor_is_refused_before_any_row(folders, tmp_path):
    model = save_tiny_vision("vit", tmp_path / "model")
    (model / "preprocessor_config.json").unlink()
    result = table({**folders, "model": str(model), "work": str(tmp_path / "work")}, "--bits", "3", code=2)
    assert "holds no image processor; put preprocessor_config.json" in result.stderr
    assert not (tmp_path / "work").exists()


def test_a_vit_is_trained_on_digits(tmp_path):
    result = CliRunner().invoke(train, [str(tmp_path / "vit"), "--epochs", "2"])
    assert result.exit_code == 0, result.output
    found = evaluate([str(tmp_path / "vit")], dataset="builtin", batch_size=100, show_progress=False)
    assert found.images == 500
    assert f"{found.models[0].score.top1:.1%} of the 500" in result.stdout
    # After two rounds it is no good model, but no guess either.
    assert found.models[0].score.top1 > 0.2
